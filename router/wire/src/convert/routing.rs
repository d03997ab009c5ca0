//! Router LSAs and address pages.

use super::{
    ConvertError, at_most, check, parse_certificate, parse_endpoints, parse_name, parse_router_id,
    parse_site_id,
};
use crate::proto::routing as wire;
use skein_core::{
    ADDRESS_PAGES, AddressEntry, AddressPage, Handle, Label, LinkAdvert, LinkId, Port, Protocol,
    Role, RouterLsa, Strategy, Subkey, page_of,
};
use std::sync::Arc;

/// Most links of a router: as many as fit into a record with room to spare.
const LINKS_MAX: usize = 1_024;
/// Most addresses on a page.
const PAGE_ENTRIES_MAX: usize = 2_048;
/// Most ports of an address.
const PORTS_MAX: usize = 64;

pub(super) fn parse_lsa(lsa: &wire::RouterLsa) -> Result<RouterLsa, ConvertError> {
    at_most(&lsa.links, LINKS_MAX, "links")?;
    check(lsa.handle != 0, "handle")?;
    check(lsa.protocol_min <= lsa.protocol_max, "protocol range")?;
    check(!lsa.leaving || lsa.links.is_empty(), "farewell")?;
    let links = lsa.links.iter().map(parse_link).collect::<Result<Vec<_>, _>>()?;
    check(links.is_sorted_by(|a, b| a.label < b.label), "labels")?;
    Ok(RouterLsa {
        router: parse_router_id(&lsa.router_id)?,
        site: parse_site_id(&lsa.site_id)?,
        name: parse_name(&lsa.name, "router name")?,
        site_name: parse_name(&lsa.site_name, "site name")?,
        // A role of a later version is not one that may be transit.
        role: if lsa.role() == wire::Role::Interior { Role::Interior } else { Role::Edge },
        handle: Handle(lsa.handle),
        pages_since: lsa.pages_since,
        boot_epoch: u32::try_from(lsa.boot_epoch)
            .map_err(|_| ConvertError::Field("boot epoch"))?
            .into(),
        certificate: parse_certificate(&lsa.certificate)?,
        links,
        protocol_min: lsa.protocol_min,
        protocol_max: lsa.protocol_max,
        endpoints: parse_endpoints(&lsa.endpoints)?,
        version: parse_name(&lsa.version, "version")?,
        leaving: lsa.leaving,
    })
}

fn parse_link(link: &wire::LinkState) -> Result<LinkAdvert, ConvertError> {
    let label = u16::try_from(link.label).ok().filter(|&label| label != 0);
    let cost = u16::try_from(link.cost).ok().filter(|&cost| cost != 0);
    Ok(LinkAdvert {
        neighbor: parse_router_id(&link.neighbor)?,
        link: LinkId(link.link_id),
        label: Label(label.ok_or(ConvertError::Field("label"))?),
        cost: cost.ok_or(ConvertError::Field("link cost"))?,
        rtt_us: link.rtt_us,
        mtu: u16::try_from(link.mtu).map_err(|_| ConvertError::Field("link MTU"))?,
    })
}

impl From<&RouterLsa> for wire::RouterLsa {
    fn from(lsa: &RouterLsa) -> Self {
        let link = |link: &LinkAdvert| wire::LinkState {
            neighbor: link.neighbor.0.to_vec(),
            link_id: link.link.0,
            label: link.label.0.into(),
            cost: link.cost.into(),
            rtt_us: link.rtt_us,
            mtu: link.mtu.into(),
        };
        Self {
            router_id: lsa.router.0.to_vec(),
            site_id: lsa.site.0.to_vec(),
            name: lsa.name.to_string(),
            site_name: lsa.site_name.to_string(),
            role: wire::Role::from(lsa.role).into(),
            handle: lsa.handle.0,
            boot_epoch: lsa.boot_epoch,
            pages_since: lsa.pages_since,
            certificate: lsa.certificate.to_vec(),
            links: lsa.links.iter().map(link).collect(),
            protocol_min: lsa.protocol_min,
            protocol_max: lsa.protocol_max,
            endpoints: lsa.endpoints.clone(),
            version: lsa.version.to_string(),
            leaving: lsa.leaving,
        }
    }
}

pub(super) fn parse_page(
    page: &wire::AddressPage,
    subkey: Subkey,
) -> Result<AddressPage, ConvertError> {
    at_most(&page.entries, PAGE_ENTRIES_MAX, "addresses on a page")?;
    let number = match subkey.as_bytes() {
        &[number] if number < ADDRESS_PAGES => number,
        _ => return Err(ConvertError::Field("page number")),
    };
    let parse = |entry| AddressEntry::try_from(entry).map(Arc::new);
    let entries: Vec<_> = page.entries.iter().map(parse).collect::<Result<_, _>>()?;
    let sorted = entries.is_sorted_by(|a, b| a.address < b.address);
    let at_home = entries.iter().all(|entry| page_of(&entry.address) == number);
    check(sorted && at_home, "address page")?;
    Ok(AddressPage { entries })
}

impl From<&AddressPage> for wire::AddressPage {
    fn from(page: &AddressPage) -> Self {
        Self { entries: page.entries.iter().map(|entry| (&**entry).into()).collect() }
    }
}

impl TryFrom<&wire::AddressEntry> for AddressEntry {
    type Error = ConvertError;

    fn try_from(entry: &wire::AddressEntry) -> Result<Self, ConvertError> {
        at_most(&entry.ports, PORTS_MAX, "ports")?;
        let address = entry.address.parse().map_err(|_| ConvertError::Field("address"))?;
        // Ports of a protocol we do not know cannot be used from here; the others can.
        let ports: Vec<Port> = entry.ports.iter().filter_map(|port| port.try_into().ok()).collect();
        check(ports.is_sorted_by(|a, b| a < b), "ports")?;
        Ok(Self {
            address,
            ports,
            strategy: entry.strategy().into(),
            cost: entry.cost,
            priority: entry.priority,
            weight: entry.weight,
            at_least_once: entry.at_least_once,
        })
    }
}

impl From<&AddressEntry> for wire::AddressEntry {
    fn from(entry: &AddressEntry) -> Self {
        Self {
            address: entry.address.to_string(),
            ports: entry.ports.iter().map(|port| (*port).into()).collect(),
            strategy: wire::Strategy::from(entry.strategy).into(),
            cost: entry.cost,
            priority: entry.priority,
            weight: entry.weight,
            at_least_once: entry.at_least_once,
        }
    }
}

impl TryFrom<&wire::Port> for Port {
    type Error = ConvertError;

    fn try_from(port: &wire::Port) -> Result<Self, ConvertError> {
        let number = u16::try_from(port.port).ok().filter(|&number| number != 0);
        let port_number = number.ok_or(ConvertError::Field("port"))?;
        Ok(Self { port: port_number, protocol: port.protocol().try_into()? })
    }
}

impl From<Port> for wire::Port {
    fn from(port: Port) -> Self {
        Self { port: port.port.into(), protocol: wire::Protocol::from(port.protocol).into() }
    }
}

impl TryFrom<wire::Protocol> for Protocol {
    type Error = ConvertError;

    fn try_from(protocol: wire::Protocol) -> Result<Self, ConvertError> {
        match protocol {
            wire::Protocol::Tcp => Ok(Self::Tcp),
            wire::Protocol::Udp => Ok(Self::Udp),
            wire::Protocol::Unspecified => Err(ConvertError::Field("protocol")),
        }
    }
}

impl From<Protocol> for wire::Protocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
        }
    }
}

impl From<wire::Strategy> for Strategy {
    fn from(strategy: wire::Strategy) -> Self {
        match strategy {
            wire::Strategy::Closest => Self::Closest,
            wire::Strategy::Priority => Self::Priority,
            wire::Strategy::Weighted => Self::Weighted,
            // What a later version means by another number is close enough to the default.
            wire::Strategy::Balanced | wire::Strategy::Unspecified => Self::Balanced,
        }
    }
}

impl From<Strategy> for wire::Strategy {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Closest => Self::Closest,
            Strategy::Balanced => Self::Balanced,
            Strategy::Priority => Self::Priority,
            Strategy::Weighted => Self::Weighted,
        }
    }
}

impl From<Role> for wire::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Interior => Self::Interior,
            Role::Edge => Self::Edge,
        }
    }
}
