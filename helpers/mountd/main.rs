//! mountd.
use std::process::ExitCode;

use hyperinit::wire::Role;
use hyperinit::wire::mountd::Reply;
use hyperinit::wire::mountd::Request;
use hyperinit::{embedded_policy, helper};

fn main() -> ExitCode {
    helper::run(
        Role::Mountd,
        embedded_policy!("mountd"),
        |_profile| Ok(hyperinit::sandbox::CapSet::default()),
        |_options| Ok(()),
        |(), requests, replies| helper::serve(requests, replies, |_request: Request| Ok(Reply::Done)),
    )
}
