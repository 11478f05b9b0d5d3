//! netd: sets up the guest's links. It has one netlink socket, opened before it was confined, and nothing else.

mod kernel;
mod plan;

use std::process::ExitCode;

use hyperinit::sandbox::CapSet;
use hyperinit::wire::Role;
use hyperinit::wire::netd::Reply;
use hyperinit::{embedded_policy, helper};

use kernel::Kernel;

/// The program, alone or as a part of the guest's (src/main.rs).
pub fn main() -> ExitCode {
    helper::run(
        Role::Netd,
        embedded_policy!("netd"),
        |_profile| Ok(CapSet::default()),
        |_options| Kernel::open(),
        |mut kernel, requests, replies| {
            helper::serve(requests, replies, |request| {
                plan::steps(&request)?
                    .into_iter()
                    .try_for_each(|step| kernel.apply(step))
                    .map(|()| Reply::Done)
            })
        },
    )
}
