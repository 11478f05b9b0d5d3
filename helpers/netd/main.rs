//! netd: sets up the guest's links, addresses, routes and port mapping. It has only netlink sockets, opened
//! before it was confined. It keeps no state between requests: all state is in the kernel.
#![forbid(unsafe_code)]

mod address;
mod answer;
mod apply;
mod kernel;
mod links;
mod nft;
mod plan;
mod ports;
mod routes;
mod snapshot;

use std::process::ExitCode;

use hyperinit::fault::Fault;
use hyperinit::sandbox::CapSet;
use hyperinit::wire::Role;
use hyperinit::wire::netd::{Reply, Request};
use hyperinit::{embedded_policy, helper};

use kernel::Kernel;

/// The program, alone or as a part of the guest's (src/main.rs).
pub fn main() -> ExitCode {
    helper::run(
        Role::Netd,
        embedded_policy!("netd"),
        |_options| Ok(CapSet::default()),
        |_options| Kernel::open(),
        |mut kernel, requests, replies| {
            helper::serve(requests, replies, |request| handle(&mut kernel, request))
        },
    )
}

fn handle(kernel: &mut Kernel, request: Request) -> Result<Reply, Fault> {
    let done = match request {
        Request::SetLinkUp { device } => kernel.apply(&links::up(&device)?),
        Request::SetInterfaces { interfaces, repeated } => {
            let before = apply::set_interfaces(kernel, &interfaces, repeated)?;
            return Ok(Reply::Set { before });
        }
        Request::AddRoutes { routes, repeated } => apply::add_routes(kernel, &routes, repeated),
        Request::SetPorts { mapping } => apply::set_ports(kernel, &mapping),
        Request::Reset { network } => apply::reset(kernel, &network),
    };
    done.map(|()| Reply::Done)
}
