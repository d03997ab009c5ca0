//! The networks the tests use.

use std::net::Ipv4Addr;

use anyhow::Result;
use skein_lab::{Lab, Lan};

use crate::Site;

/// A public address range that is documentation.
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 0);

/// One reachable site and two behind NATs of their own, linked to it.
#[derive(Debug)]
pub struct Hub {
    /// The network.
    pub lab: Lab,
    /// The LAN of hub and gateways.
    pub internet: Lan,
    /// The reachable site.
    pub hub: Site,
    /// Behind a NAT.
    pub branch: Site,
    /// Behind another.
    pub dc: Site,
}

impl Hub {
    /// Builds and links it.
    ///
    /// # Errors
    /// When anything fails.
    pub fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let internet = lab.lan("internet", PUBLIC)?;
        let host = lab.host("hub")?;
        let address = host.join(&internet)?.to_string();
        let hub = Site::init(&host, &["--advertise", &address])?;
        let branch = Site::init(&lab.host_behind_nat("branch", &internet)?, &[])?;
        let dc = Site::init(&lab.host_behind_nat("dc", &internet)?, &[])?;
        branch.link_to(&hub, &[])?;
        dc.link_to(&hub, &[])?;
        Ok(Self { lab, internet, hub, branch, dc })
    }
}

/// Two sites behind NATs, joined by two transits.
#[derive(Debug)]
pub struct Diamond {
    /// The network.
    pub lab: Lab,
    /// The LAN of transits and gateways.
    pub internet: Lan,
    /// The transits.
    pub transits: [Site; 2],
    /// One leaf.
    pub a: Site,
    /// The other leaf.
    pub b: Site,
}

impl Diamond {
    /// Builds and links it.
    ///
    /// # Errors
    /// When anything fails.
    pub fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let internet = lab.lan("internet", PUBLIC)?;
        let transit = |name: &str| {
            let host = lab.host(name)?;
            let address = host.join(&internet)?.to_string();
            Site::init(&host, &["--advertise", &address])
        };
        let transits = [transit("t1")?, transit("t2")?];
        let leaf = |name: &str| {
            let site = Site::init(&lab.host_behind_nat(name, &internet)?, &["--no-listen"])?;
            site.link_to(&transits[0], &[])?;
            Ok::<_, anyhow::Error>(site)
        };
        let (a, b) = (leaf("a")?, leaf("b")?);
        // All of one network by now, so the other transit is a member first and a neighbour then.
        transits[1].link_to(&transits[0], &["--cost", "10"])?;
        a.link_to(&transits[1], &[])?;
        b.link_to(&transits[1], &[])?;
        Ok(Self { lab, internet, transits, a, b })
    }
}
