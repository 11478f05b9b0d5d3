//! The network: what STARTPOD sets up and what of it is taken back, the ports of containers, and the commands
//! about one interface.

use std::collections::BTreeMap;

use super::answer::Answer;
use super::state::{PodStep, Purpose};
use super::{Supervisor, Ticket, warn};
use crate::fault::Fault;
use crate::ids::ContainerId;
use crate::spec::{Container, Interface, Pod, Port, PortmappingWhiteLists, Protocol, Route};
use crate::wire::mountd;
use crate::wire::netd::{self, Before, PORTS_MAX, PortMapping};

/// What STARTPOD has set up, kept while the pod exists.
#[derive(Debug, Default)]
pub(super) struct Network {
    interfaces: Vec<Interface>,
    /// The state of these links before, if netd reported it.
    before: Vec<Before>,
    routes: Vec<Route>,
    /// None: nothing is filtered, and port mappings are ignored.
    white_lists: Option<PortmappingWhiteLists>,
}

impl Network {
    /// Records a step of STARTPOD that was done, or that a helper died over: a part of it may have been done.
    pub(super) fn note(&mut self, step: PodStep, pod: &Pod, answer: Option<&Answer>) {
        match step {
            PodStep::Ports => self.white_lists = white_lists(pod).cloned(),
            PodStep::Interfaces => {
                self.interfaces.clone_from(&pod.interfaces);
                self.before = match answer {
                    Some(Answer::Set(before)) => before.clone(),
                    _ => Vec::new(),
                };
            }
            PodStep::Routes => self.routes.clone_from(&pod.routes),
            PodStep::Loopback
            | PodStep::Rescan
            | PodStep::Files
            | PodStep::Init
            | PodStep::Join
            | PodStep::Undo
            | PodStep::UndoNetwork => {}
        }
    }
}

/// The pod's white lists. If both lists are empty the pod has none, as in the C original.
fn white_lists(pod: &Pod) -> Option<&PortmappingWhiteLists> {
    let lists = pod.portmapping_white_lists.as_ref();
    lists.filter(|lists| !lists.internal_networks.is_empty() || !lists.external_networks.is_empty())
}

/// Whether a pod needs a step of STARTPOD.
pub(super) fn needs(pod: &Pod, step: PodStep, local: bool) -> bool {
    match step {
        PodStep::Ports => white_lists(pod).is_some(),
        // The bus of a local guest is the machine's.
        PodStep::Rescan => !pod.interfaces.is_empty() && !local,
        PodStep::Interfaces => !pod.interfaces.is_empty(),
        PodStep::Routes => !pod.routes.is_empty(),
        PodStep::Loopback
        | PodStep::Files
        | PodStep::Init
        | PodStep::Join
        | PodStep::Undo
        | PodStep::UndoNetwork => true,
    }
}

/// The port mapping of a pod that has no containers yet.
pub(super) fn base(pod: &Pod) -> PortMapping {
    PortMapping { white_lists: white_lists(pod).cloned().unwrap_or_default(), ports: Vec::new() }
}

// ---- ports ----

impl Supervisor {
    /// The ports of a new container that are mapped.
    pub(super) fn mapped(&self, container: &Container) -> Vec<Port> {
        match &self.network.white_lists {
            None => Vec::new(),
            Some(_) => container.ports.iter().filter(|port| port.host_port != 0).cloned().collect(),
        }
    }

    /// Whether a new container can have its ports: each host port may lead to one container port only.
    pub(super) fn check_ports(&self, container: &Container) -> Result<(), Fault> {
        let fault = |why: String| Fault::new("mapping the ports of", &container.id, why);
        let mut taken: BTreeMap<(Protocol, u16), (&ContainerId, u16)> = BTreeMap::new();
        for (id, known) in self.containers.iter().filter(|(id, _)| **id != container.id) {
            for port in &known.ports {
                if let Ok(Some(host)) = port.check() {
                    taken.insert(host, (id, port.container_port));
                }
            }
        }
        let mut count = taken.len();
        for port in self.mapped(container) {
            let Some(host) = port.check().map_err(fault)? else { continue };
            count += 1;
            let own = (&container.id, port.container_port);
            if let Some((id, _)) = taken.insert(host, own).filter(|old| *old != own) {
                let (protocol, number) = host;
                return Err(fault(format!("the host's {number}/{protocol} leads to container {id}")));
            }
        }
        if count > PORTS_MAX {
            return Err(fault(format!("the pod would have more than {PORTS_MAX}")));
        }
        Ok(())
    }

    /// Asks netd to open a container's ports; false if the container has none.
    pub(super) fn open_ports(&mut self, id: &ContainerId, purpose: Purpose) -> bool {
        let Some(known) = self.containers.get_mut(id).filter(|known| !known.ports.is_empty()) else {
            return false;
        };
        known.open = true;
        self.ask_ports(purpose);
        true
    }

    /// Closes a container's ports. Nothing waits for the answer, because netd does later requests after this
    /// one.
    pub(super) fn close_ports(&mut self, id: &ContainerId) {
        let Some(known) = self.containers.get_mut(id) else { return };
        known.ports.clear();
        if std::mem::take(&mut known.open) {
            self.ask_ports(Purpose::Nothing);
        }
    }

    /// Asks netd to let in what is open now, and nothing else.
    pub(super) fn ask_ports(&mut self, purpose: Purpose) {
        let Some(white_lists) = self.network.white_lists.clone() else { return };
        let open = self.containers.values().filter(|known| known.open);
        let ports = open.flat_map(|known| known.ports.iter().cloned()).collect();
        let request = netd::Request::SetPorts { mapping: PortMapping { white_lists, ports } };
        match purpose {
            // Each request lists all open ports. With a thousand containers that end at once, only the last
            // unsent list is kept.
            Purpose::Nothing => self.queues.ask_instead(request),
            purpose => self.queues.ask(request, purpose),
        }
    }

    /// Asks netd to take back what STARTPOD set up; false if that is nothing.
    pub(super) fn reset_network(&mut self, purpose: Purpose) -> bool {
        let Network { interfaces, before, routes, white_lists } = std::mem::take(&mut self.network);
        let network = netd::Network { interfaces, before, routes, ports: white_lists.is_some() };
        let something = network != netd::Network::default();
        if something {
            self.queues.ask(netd::Request::Reset { network }, purpose);
        }
        something
    }
}

// ---- commands ----

impl Supervisor {
    /// SETUPINTERFACE.
    pub(super) fn set_up_interface(&mut self, ticket: Ticket, interface: Interface) {
        if self.config.local {
            return self.rescanned(ticket, interface, Ok(Answer::Done));
        }
        self.queues.ask(mountd::Request::Rescan, Purpose::Rescanned(ticket, Box::new(interface)));
    }

    /// The bus was scanned for a NIC, or the scan failed; the kernel may have found the NIC in either case.
    pub(super) fn rescanned(&mut self, ticket: Ticket, interface: Interface, result: Result<Answer, Fault>) {
        warn(result);
        let request = netd::Request::SetInterfaces { interfaces: vec![interface], repeated: false };
        self.queues.ask(request, Purpose::Command(ticket));
    }
}
