//! streamd.
use std::process::ExitCode;

use hyperinit::wire::Role;
use hyperinit::wire::streamd::Reply;
use hyperinit::wire::streamd::Request;
use hyperinit::{embedded_policy, helper};

fn main() -> ExitCode {
    helper::run(
        Role::Streamd,
        embedded_policy!("streamd"),
        |_profile| Ok(hyperinit::sandbox::CapSet::default()),
        |_options| Ok(()),
        |(), requests, replies| helper::serve(requests, replies, |_request: Request| Ok(Reply::Drained)),
    )
}
