//! hyperctl.
fn main() {}
