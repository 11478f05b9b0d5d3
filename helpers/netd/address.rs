//! Addresses, masks and networks as a host writes them. Pure functions.

use std::net::IpAddr;

/// An address, and the number of its bits that are the network's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Network {
    /// The address.
    pub address: IpAddr,
    /// The number of the network's bits: at most the length of the address.
    pub prefix: u8,
}

impl Network {
    /// Reads an address and its mask: a prefix length or, for IPv4, a dotted mask. An empty mask covers the
    /// whole address. The error says what is wrong, in words.
    pub fn new(address: &str, mask: &str) -> Result<Network, String> {
        let address: IpAddr = address.parse().map_err(|_| format!("{address:?} is not an address"))?;
        let prefix = match mask {
            "" => bits(&address),
            mask => prefix(&address, mask).ok_or_else(|| format!("{mask:?} is not the mask of {address}"))?,
        };
        Ok(Network { address, prefix })
    }

    /// Reads `address/mask`, or an address alone. Errors are those of [`Network::new`].
    pub fn parse(text: &str) -> Result<Network, String> {
        let (address, mask) = match text.split_once('/') {
            Some((_, "")) => return Err(format!("{text:?} has an empty mask")),
            Some(parts) => parts,
            None => (text, ""),
        };
        Network::new(address, mask)
    }

    /// The mask as bytes, with the length of the address.
    pub fn mask(&self) -> Vec<u8> {
        let whole = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
        whole.to_be_bytes().into_iter().take(usize::from(bits(&self.address) / 8)).collect()
    }

    /// The network's own address as bytes: all bits beyond the prefix are 0.
    pub fn masked(&self) -> Vec<u8> {
        octets(&self.address).into_iter().zip(self.mask()).map(|(byte, mask)| byte & mask).collect()
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The address as bytes.
fn octets(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The number of bits of an address of this family.
pub fn bits(address: &IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn prefix(address: &IpAddr, mask: &str) -> Option<u8> {
    if mask.bytes().all(|byte| byte.is_ascii_digit()) {
        return mask.parse().ok().filter(|prefix| *prefix <= bits(address));
    }
    let dotted = u32::from_be_bytes(mask.parse::<std::net::Ipv4Addr>().ok()?.octets());
    let whole = dotted.leading_ones() + dotted.trailing_zeros() == u32::BITS;
    (address.is_ipv4() && whole).then(|| u8::try_from(dotted.leading_ones()).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_prefixes_or_dotted() {
        for (address, mask, expected) in [
            ("10.0.0.2", "24", Some(24)),
            ("10.0.0.2", "255.255.255.0", Some(24)),
            ("10.0.0.2", "255.255.255.255", Some(32)),
            ("10.0.0.2", "0.0.0.0", Some(0)),
            ("10.0.0.2", "255.254.0.0", Some(15)),
            ("10.0.0.2", "0", Some(0)),
            ("10.0.0.2", "", Some(32)),
            ("10.0.0.2", "33", None),
            ("10.0.0.2", "255.0.255.0", None),
            ("10.0.0.2", "0.0.0.255", None),
            ("10.0.0.2", "+24", None),
            ("10.0.0.2", "-1", None),
            ("10.0.0.2", "ffff::", None),
            ("fec0::2", "64", Some(64)),
            ("fec0::2", "128", Some(128)),
            ("fec0::2", "", Some(128)),
            ("fec0::2", "129", None),
            ("fec0::2", "255.255.255.0", None),
            ("fec0::2", "ffff::", None),
            ("10.0.0", "24", None),
            ("", "24", None),
            ("010.0.0.1", "24", None),
            ("eth0", "24", None),
        ] {
            let network = Network::new(address, mask);
            assert_eq!(network.as_ref().ok().map(|network| network.prefix), expected, "{network:?}");
        }
    }

    #[test]
    fn a_network_is_an_address_and_a_mask() {
        assert_eq!(Network::parse("10.1.2.3/255.0.0.0").unwrap().to_string(), "10.1.2.3/8");
        assert_eq!(Network::parse("10.1.2.3").unwrap().to_string(), "10.1.2.3/32");
        assert_eq!(Network::parse("2001:db8::/32").unwrap().to_string(), "2001:db8::/32");
        for bad in ["", "/", "10.0.0.0/", "/8", "10.0.0.0/8/8", "10.0.0.0/8 ", "all"] {
            assert!(Network::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn bytes_of_a_mask() {
        let network = |text| Network::parse(text).unwrap();
        assert_eq!(network("10.9.8.7/12").mask(), [255, 240, 0, 0]);
        assert_eq!(network("10.9.8.7/12").masked(), [10, 0, 0, 0]);
        assert_eq!(network("0.0.0.0/0").mask(), [0; 4]);
        assert_eq!(network("1.2.3.4").mask(), [255; 4]);
        let mut half = [0; 16];
        half[..8].fill(255);
        assert_eq!(network("fec0::1/64").mask(), half);
        assert_eq!(network("::/0").mask(), [0; 16]);
        assert_eq!(network("::1").mask(), [255; 16]);
    }
}
