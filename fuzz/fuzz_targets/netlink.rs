//! The kernel's answers on netlink. They are trusted more than other input, but they quote names and words
//! that are not the kernel's own. Whatever a datagram holds, reading it ends, and takes memory in proportion
//! to its length.
#![forbid(unsafe_code)]
#![no_main]

use hyperinit_fuzz::{Choices, measure};
use libfuzzer_sys::fuzz_target;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;

#[path = "../../helpers/netd/address.rs"]
#[allow(dead_code)]
mod address;
#[path = "../../helpers/netd/answer.rs"]
mod answer;
#[path = "../../helpers/netd/links.rs"]
#[allow(dead_code)]
mod links;
#[path = "../../helpers/netd/plan.rs"]
#[allow(dead_code)]
mod plan;
#[path = "../../helpers/netd/snapshot.rs"]
#[allow(dead_code)]
mod snapshot;

/// netd's limit.
const ANSWER_MAX: usize = 32 << 10;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let sequence = u32::from(choices.byte());
    let datagram = choices.rest();
    if datagram.len() > ANSWER_MAX {
        return;
    }
    if let Some(verdict) = answer::Verdict::read(datagram) {
        let refused = verdict.result.map_err(|refusal| refusal.fault("adding", "it").to_string());
        assert!(refused.err().is_none_or(|text| text.len() < 4096));
    }
    let mut list = answer::List::default();
    let (listed, held) = measure(|| list.read(datagram, sequence));
    let all = list.all;
    assert!(held <= 256 * datagram.len() + 65_536, "{held} bytes for {}", datagram.len());
    assert!(all.len() <= datagram.len() / 16, "more messages than headers");
    if listed == Ok(true) {
        assert!(datagram.len() >= 16, "an end without a message");
    }
    for message in all {
        // It must be possible to encode what is restored.
        for index in [0, 1, 2] {
            if let Some(step) = snapshot::restoring(message.clone(), index) {
                let mut message =
                    NetlinkMessage::new(Default::default(), NetlinkPayload::InnerMessage(step.message));
                message.finalize();
                let mut bytes = vec![0; message.buffer_len()];
                message.serialize(&mut bytes);
                let back = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes);
                assert!(back.is_ok(), "{:?} of {message:?}", back.err());
            }
        }
    }
    let _ = answer::link(datagram, sequence);
});
