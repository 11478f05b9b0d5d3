//! netd.
use std::process::ExitCode;

use hyperinit::wire::Role;
use hyperinit::wire::netd::Reply;
use hyperinit::wire::netd::Request;
use hyperinit::{embedded_policy, helper};

fn main() -> ExitCode {
    helper::run(
        Role::Netd,
        embedded_policy!("netd"),
        |_profile| Ok(hyperinit::sandbox::CapSet::default()),
        |_options| Ok(()),
        |(), requests, replies| helper::serve(requests, replies, |_request: Request| Ok(Reply::Done)),
    )
}
