//! A request as netlink messages: pure.

use hyperinit::fault::Fault;
use hyperinit::wire::netd::Request;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

/// The kernel's IFNAMSIZ, with its zero.
const NAME_MAX: usize = 15;

/// One message, and what it does as an error says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// A verb phrase.
    pub doing: &'static str,
    /// To which link.
    pub to: String,
    /// The message.
    pub message: RouteNetlinkMessage,
}

/// What has to be said to the kernel, in order.
pub fn steps(request: &Request) -> Result<Vec<Step>, Fault> {
    match request {
        Request::SetLinkUp { device } => {
            check_name(device)?;
            let mut link = LinkMessage::default();
            link.header.flags = LinkFlags::Up;
            link.header.change_mask = LinkFlags::Up;
            link.attributes.push(LinkAttribute::IfName(device.clone()));
            let message = RouteNetlinkMessage::SetLink(link);
            Ok(vec![Step { doing: "bringing up", to: device.clone(), message }])
        }
    }
}

/// What the kernel takes as a link's name (dev_valid_name in net/core/dev.c).
fn check_name(name: &str) -> Result<(), Fault> {
    let bad = name.is_empty()
        || name.len() > NAME_MAX
        || name == "."
        || name == ".."
        || name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if bad {
        Err(Fault::new("reading", "device", format!("{name:?} is not the name of a link")))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up(device: &str) -> Result<Vec<Step>, Fault> {
        steps(&Request::SetLinkUp { device: device.to_owned() })
    }

    #[test]
    fn a_link_is_brought_up_by_its_name() {
        let steps = up("lo").unwrap();
        let [Step { message: RouteNetlinkMessage::SetLink(link), .. }] = steps.as_slice() else {
            panic!("{steps:?}")
        };
        assert_eq!((link.header.flags, link.header.change_mask), (LinkFlags::Up, LinkFlags::Up));
        assert_eq!(link.attributes, [LinkAttribute::IfName("lo".to_owned())]);
    }

    #[test]
    fn a_name_is_one_the_kernel_takes() {
        for bad in ["", ".", "..", "a/b", "a b", "a:0", "sixteen-letters!", "a\n"] {
            assert!(up(bad).is_err(), "{bad:?}");
        }
        assert!(up("fifteen-letters").is_ok());
    }
}
