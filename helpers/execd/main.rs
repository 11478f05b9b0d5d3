//! execd.
use std::process::ExitCode;

use hyperinit::wire::Role;
use hyperinit::wire::execd::Reply;
use hyperinit::wire::execd::Request;
use hyperinit::{embedded_policy, helper};

fn main() -> ExitCode {
    helper::run(
        Role::Execd,
        embedded_policy!("execd"),
        |_profile| Ok(hyperinit::sandbox::CapSet::default()),
        |_options| Ok(()),
        |(), requests, replies| helper::serve(requests, replies, |_request: Request| Ok(Reply::Done)),
    )
}
