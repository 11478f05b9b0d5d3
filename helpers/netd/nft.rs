//! The words of nf_tables (linux/netfilter/nf_tables.h) that port mapping needs: expressions of rules, sets
//! and their elements, of one table that has IPv4 and IPv6. Pure.

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

/// The table; nothing outside of it is touched.
pub const TABLE: &str = "hyperstart";

/// NF_DROP and NF_ACCEPT of linux/netfilter.h, as policies and as verdicts.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// NFPROTO_IPV4 and NFPROTO_IPV6 of linux/netfilter.h.
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// Where a packet's source address is in its header.
const SOURCE_V4: u32 = 12;
const SOURCE_V6: u32 = 8;
/// Where TCP, UDP and SCTP have the destination's port, and how long it is.
const PORT: (u32, u32) = (2, 2);
/// nft_payload_bases.
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// ARPHRD_LOOPBACK of linux/if_arp.h.
const LOOPBACK: u16 = 772;
/// How nft(8) names a set's key and data: informational. The key is a protocol and a port.
const PROTOCOL_TYPE: u32 = 12;
const PORT_TYPE: u32 = 13;
const KEY_TYPE: u32 = PROTOCOL_TYPE << 6 | PORT_TYPE;
/// A protocol and a port, each in a register of four bytes.
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

/// The table, if it is not there.
pub fn add_table() -> NetfilterMessage {
    message(NfTablesMessage::NewTable(table()))
}

/// The table with all that is in it.
pub fn delete_table() -> NetfilterMessage {
    message(NfTablesMessage::DeleteTable(table()))
}

/// What becomes of a packet that no rule has decided about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// It goes on.
    Accept,
    /// It is gone.
    Drop,
}

/// A chain at a hook; packets meet those of a lower priority first.
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

/// A rule at the end of a chain.
pub fn rule(chain: &str, expressions: Rule) -> NetfilterMessage {
    let attributes = vec![
        RuleAttribute::Table(TABLE.to_owned()),
        RuleAttribute::Chain(chain.to_owned()),
        RuleAttribute::Expressions(expressions.into_iter().map(ListAttribute::from).collect()),
    ];
    message(NfTablesMessage::NewRule(RuleMessage { attributes }))
}

// ---- sets ----

/// A set of ports, or with `to_port` a map from ports to ports. `id` tells it from the others of the
/// transaction.
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

/// A port of a protocol, and for a map the port that it leads to.
pub type Element = ((u8, u16), Option<u16>);

/// Elements of a set; not more than an attribute holds (64 kB: a thousand).
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

// ---- what a packet is ----

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

/// It belongs to a connection that was accepted.
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

/// It is of that protocol.
pub fn protocol(number: u8) -> Rule {
    vec![meta(MetaKey::L4Proto, Register::Reg1), compare(Operator::Equal, vec![number])]
}

/// It comes from the guest itself.
pub fn from_loopback() -> Rule {
    vec![meta(MetaKey::Iftype, Register::Reg1), compare(Operator::Equal, LOOPBACK.to_ne_bytes().to_vec())]
}

/// It comes from that network.
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

/// Its protocol and port are in a set; of a map what they lead to is then at hand.
fn lookup(set: &str, to: Option<Register>) -> Rule {
    let mut attributes = vec![Lookup::Set(set.to_owned()), Lookup::SourceRegister(KEY.0)];
    attributes.extend(to.map(Lookup::DestinationRegister));
    vec![meta(MetaKey::L4Proto, KEY.0), load(TRANSPORT_HEADER, PORT, KEY.1), Expressions::Lookup(attributes)]
}

/// Its protocol and port are in a set.
pub fn to_port_of(set: &str) -> Rule {
    lookup(set, None)
}

// ---- what becomes of it ----

/// It is let in.
pub fn accept() -> Rule {
    let verdict = VerdictAttribute::Code(Verdict::Other(ACCEPT));
    vec![Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(vec![verdict])),
    ])]
}

/// It goes to the port that a map has for its own.
pub fn redirect_by(map: &str) -> Rule {
    /// NFTA_REDIR_REG_PROTO_MIN.
    const PORT_REGISTER: u16 = 1;
    let mut rule = lookup(map, Some(Register::Reg1));
    let register = u32::from(Register::Reg1).to_be_bytes().to_vec();
    let attributes = vec![DefaultNla::new(PORT_REGISTER, register)];
    rule.push(Expressions::Other { expression_type: "redir".to_owned(), attributes });
    rule
}
