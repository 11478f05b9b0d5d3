//! Requests to netd.

use hyperinit::fault::Fault;
use hyperinit::wire::netd::{Before, Network, PortMapping, Reply, Request};
use serde_json::Value;

pub use super::support::net::{World, addresses, everything, ip, ip_json, listen, nft};

use super::support::helper::Helper;

/// SetInterfaces.
pub fn set(netd: &mut Helper, interfaces: Value) -> Result<Reply, Fault> {
    let interfaces = serde_json::from_value(interfaces).unwrap();
    netd.ask(&Request::SetInterfaces { interfaces, repeated: false })
}

/// The same, of which a predecessor may have done a part.
pub fn set_again(netd: &mut Helper, interfaces: Value) -> Result<Reply, Fault> {
    let interfaces = serde_json::from_value(interfaces).unwrap();
    netd.ask(&Request::SetInterfaces { interfaces, repeated: true })
}

/// AddRoutes.
pub fn route(netd: &mut Helper, routes: Value) -> Result<Reply, Fault> {
    netd.ask(&Request::AddRoutes { routes: serde_json::from_value(routes).unwrap(), repeated: false })
}

/// The same, of which a predecessor may have done a part.
pub fn route_again(netd: &mut Helper, routes: Value) -> Result<Reply, Fault> {
    netd.ask(&Request::AddRoutes { routes: serde_json::from_value(routes).unwrap(), repeated: true })
}

/// SetPorts.
pub fn map(netd: &mut Helper, lists: Value, ports: Value) -> Result<Reply, Fault> {
    let mapping = PortMapping {
        white_lists: serde_json::from_value(lists).unwrap(),
        ports: serde_json::from_value(ports).unwrap(),
    };
    netd.ask(&Request::SetPorts { mapping })
}

/// Reset.
pub fn reset(netd: &mut Helper, interfaces: Value, routes: Value, ports: bool) -> Result<Reply, Fault> {
    reset_to(netd, interfaces, routes, ports, Vec::new())
}

/// The same, where it is known what the links were.
pub fn reset_to(
    netd: &mut Helper,
    interfaces: Value,
    routes: Value,
    ports: bool,
    before: Vec<Before>,
) -> Result<Reply, Fault> {
    let network = Network {
        interfaces: serde_json::from_value(interfaces).unwrap(),
        before,
        routes: serde_json::from_value(routes).unwrap(),
        ports,
    };
    netd.ask(&Request::Reset { network })
}
