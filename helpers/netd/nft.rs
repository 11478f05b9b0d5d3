//! The messages of nf_tables (linux/netfilter/nf_tables.h) that port mapping needs: rules and their
//! expressions, sets and their elements, in one table for IPv4 and IPv6. Pure functions.

use std::net::IpAddr;

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook, Immediate, InetHookNumber,
    ListAttribute, Lookup, Meta, MetaKey, NfTablesMessage, Operator, Payload, Register, RuleAttribute,
    RuleMessage, SetAttribute, SetElementAttribute, SetElementList, SetElementMessage, SetFlags, SetMessage,
    TableAttribute, TableMessage, Verdict, VerdictAttribute,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};

use super::address::Network;

/// The name of the table. Nothing outside of it is changed.
pub const TABLE: &str = "hyperstart";

/// NF_DROP and NF_ACCEPT of linux/netfilter.h, as policies and as verdicts.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// NFPROTO_IPV4 and NFPROTO_IPV6 of linux/netfilter.h.
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// The offset of the source address in a packet's network header, in bytes.
const SOURCE_V4: u32 = 12;
const SOURCE_V6: u32 = 8;
/// The offset and length, in bytes, of the destination port in the headers of TCP, UDP and SCTP.
const PORT: (u32, u32) = (2, 2);
/// Values of nft_payload_bases.
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// ARPHRD_LOOPBACK of linux/if_arp.h.
const LOOPBACK: u16 = 772;
/// The types by which nft(8) names a set's key and data; they are informational. The key is a protocol and a
/// port.
const PROTOCOL_TYPE: u32 = 12;
const PORT_TYPE: u32 = 13;
const KEY_TYPE: u32 = PROTOCOL_TYPE << 6 | PORT_TYPE;
/// The length of a key in bytes: a protocol and a port, each in a register of four bytes.
const KEY_LENGTH: u32 = 8;
const KEY: (Register, Register) = (Register::Reg1, Register::Reg32_01);

/// A rule's expressions.
pub type Rule = Vec<Expressions>;

fn message(message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0), message)
}

fn table() -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(TABLE.to_owned())] }
}

/// The message that creates the table if it is missing.
pub fn add_table() -> NetfilterMessage {
    message(NfTablesMessage::NewTable(table()))
}

/// The message that deletes the table with its content.
pub fn delete_table() -> NetfilterMessage {
    message(NfTablesMessage::DeleteTable(table()))
}

/// The policy of a chain, for packets that no rule has decided about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The packet goes on.
    Accept,
    /// The packet is dropped.
    Drop,
}

/// The message that adds a chain at a hook. Packets traverse chains of a lower priority number first.
pub fn chain(
    name: &str,
    kind: &str,
    hook: InetHookNumber,
    priority: i32,
    policy: Policy,
) -> NetfilterMessage {
    let policy = match policy {
        Policy::Accept => ACCEPT,
        Policy::Drop => DROP,
    };
    let hook = vec![Hook::Number(hook.into()), Hook::Priority(priority.cast_unsigned())];
    let attributes = vec![
        ChainAttribute::Table(TABLE.to_owned()),
        ChainAttribute::Name(name.to_owned()),
        ChainAttribute::Hook(hook),
        ChainAttribute::Policy(policy),
        ChainAttribute::Type(kind.to_owned()),
    ];
    message(NfTablesMessage::NewChain(ChainMessage { attributes }))
}

/// The message that adds a rule at the end of a chain.
pub fn rule(chain: &str, expressions: Rule) -> NetfilterMessage {
    let attributes = vec![
        RuleAttribute::Table(TABLE.to_owned()),
        RuleAttribute::Chain(chain.to_owned()),
        RuleAttribute::Expressions(expressions.into_iter().map(ListAttribute::from).collect()),
    ];
    message(NfTablesMessage::NewRule(RuleMessage { attributes }))
}

// ---- sets ----

/// The message that adds a set of ports or, with `to_port`, a map from ports to ports. `id` identifies the
/// set within the transaction.
pub fn set(name: &str, id: u32, to_port: bool) -> NetfilterMessage {
    let mut attributes = vec![
        SetAttribute::Table(TABLE.to_owned()),
        SetAttribute::Name(name.to_owned()),
        SetAttribute::Flags(if to_port { SetFlags::Map } else { SetFlags::empty() }),
        SetAttribute::KeyType(KEY_TYPE),
        SetAttribute::KeyLen(KEY_LENGTH),
        SetAttribute::Id(id),
    ];
    if to_port {
        attributes.extend([SetAttribute::DataType(PORT_TYPE), SetAttribute::DataLen(PORT.1)]);
    }
    message(NfTablesMessage::NewSet(SetMessage { attributes }))
}

/// A protocol and a port, and for a map the port that they map to.
pub type Element = ((u8, u16), Option<u16>);

/// The message that adds elements to a set. An attribute holds at most 64 kB, about a thousand elements.
pub fn elements(set: &str, elements: impl IntoIterator<Item = Element>) -> NetfilterMessage {
    let element = |((protocol, port), to): Element| {
        let mut attributes = vec![SetElementAttribute::Key(DataAttribute::Value(key(protocol, port)))];
        let data = to.map(|to| SetElementAttribute::Data(DataAttribute::Value(to.to_be_bytes().to_vec())));
        attributes.extend(data);
        ListAttribute::Element(attributes)
    };
    let attributes = vec![
        SetElementList::Table(TABLE.to_owned()),
        SetElementList::Set(set.to_owned()),
        SetElementList::Elements(elements.into_iter().map(element).collect()),
    ];
    message(NfTablesMessage::NewSetElement(SetElementMessage { attributes }))
}

fn key(protocol: u8, port: u16) -> Vec<u8> {
    let [high, low] = port.to_be_bytes();
    vec![protocol, 0, 0, 0, high, low, 0, 0]
}

// ---- matches ----

fn meta(key: MetaKey, register: Register) -> Expressions {
    Expressions::Meta(vec![Meta::DestinationRegister(register), Meta::Key(key)])
}

fn load(base: u32, (offset, length): (u32, u32), register: Register) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(register),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

fn compare(operator: Operator, bytes: Vec<u8>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(bytes)),
    ])
}

fn mask(bytes: Vec<u8>) -> Expressions {
    let nothing = vec![0; bytes.len()];
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(Register::Reg1),
        Bitwise::DestinationRegister(Register::Reg1),
        Bitwise::Length(u32::try_from(bytes.len()).unwrap_or_default()),
        Bitwise::Mask(DataAttribute::Value(bytes)),
        Bitwise::Xor(DataAttribute::Value(nothing)),
    ])
}

/// Matches packets of a connection that was accepted, or related to one.
pub fn established() -> Rule {
    /// NFTA_CT_DREG, NFTA_CT_KEY.
    const REGISTER: u16 = 1;
    const KEY: u16 = 2;
    /// NFT_CT_STATE.
    const STATE: u32 = 0;
    /// NF_CT_STATE_BIT of IP_CT_ESTABLISHED and IP_CT_RELATED.
    const ESTABLISHED_OR_RELATED: u32 = 1 << 1 | 1 << 2;
    let number = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    let attributes = vec![number(REGISTER, Register::Reg1.into()), number(KEY, STATE)];
    vec![
        Expressions::Other { expression_type: "ct".to_owned(), attributes },
        mask(ESTABLISHED_OR_RELATED.to_ne_bytes().to_vec()),
        compare(Operator::NotEqual, vec![0; 4]),
    ]
}

/// Matches packets of a protocol.
pub fn protocol(number: u8) -> Rule {
    vec![meta(MetaKey::L4Proto, Register::Reg1), compare(Operator::Equal, vec![number])]
}

/// Matches packets from the guest itself, by the loopback's link type.
pub fn from_loopback() -> Rule {
    vec![meta(MetaKey::Iftype, Register::Reg1), compare(Operator::Equal, LOOPBACK.to_ne_bytes().to_vec())]
}

/// Matches packets from a network.
pub fn from(network: &Network) -> Rule {
    let (family, offset) = match network.address {
        IpAddr::V4(_) => (IPV4, SOURCE_V4),
        IpAddr::V6(_) => (IPV6, SOURCE_V6),
    };
    let mut rule = vec![meta(MetaKey::Nfproto, Register::Reg1), compare(Operator::Equal, vec![family])];
    if network.prefix > 0 {
        let bytes = network.masked();
        let length = u32::try_from(bytes.len()).unwrap_or_default();
        rule.push(load(NETWORK_HEADER, (offset, length), Register::Reg1));
        rule.push(mask(network.mask()));
        rule.push(compare(Operator::Equal, bytes));
    }
    rule
}

/// Matches packets whose protocol and destination port are in a set. For a map, `to` is the register that
/// receives the mapped port.
fn lookup(set: &str, to: Option<Register>) -> Rule {
    let mut attributes = vec![Lookup::Set(set.to_owned()), Lookup::SourceRegister(KEY.0)];
    attributes.extend(to.map(Lookup::DestinationRegister));
    vec![meta(MetaKey::L4Proto, KEY.0), load(TRANSPORT_HEADER, PORT, KEY.1), Expressions::Lookup(attributes)]
}

/// Matches packets whose protocol and destination port are in a set.
pub fn to_port_of(set: &str) -> Rule {
    lookup(set, None)
}

// ---- actions ----

/// Accepts the packet.
pub fn accept() -> Rule {
    let verdict = VerdictAttribute::Code(Verdict::Other(ACCEPT));
    vec![Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(vec![verdict])),
    ])]
}

/// Redirects the packet to the port to which a map maps its own; packets without an entry do not match.
pub fn redirect_by(map: &str) -> Rule {
    /// NFTA_REDIR_REG_PROTO_MIN.
    const PORT_REGISTER: u16 = 1;
    let mut rule = lookup(map, Some(Register::Reg1));
    let register = u32::from(Register::Reg1).to_be_bytes().to_vec();
    let attributes = vec![DefaultNla::new(PORT_REGISTER, register)];
    rule.push(Expressions::Other { expression_type: "redir".to_owned(), attributes });
    rule
}
