//! The networks the tests use.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use skein_lab::{Host, Lab, Lan, Wan};

use crate::{Shown, Site};

/// A public address range that is documentation.
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 0);

/// A network of one public LAN.
///
/// # Errors
/// When the machine does not allow namespaces.
pub fn internet() -> Result<(Lab, Lan)> {
    let lab = Lab::new()?;
    let internet = lab.lan("internet", PUBLIC)?;
    Ok((lab, internet))
}

/// A site that others reach, on a host of its own.
///
/// # Errors
/// When host or site cannot be made.
pub fn reachable(lab: &Lab, internet: &Lan, name: &str) -> Result<Site> {
    let host = lab.host(name)?;
    let address = host.join(internet)?.to_string();
    Site::init(&host, &["--advertise", &address])
}

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
        let (lab, internet) = internet()?;
        let hub = reachable(&lab, &internet, "hub")?;
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
        Self::of(|lab, internet, name| lab.host_behind_nat(name, internet))
    }

    /// The same with a WAN box instead of a NAT before each leaf, passing everything at first.
    ///
    /// # Errors
    /// When anything fails.
    pub fn behind_wans(seed: u64) -> Result<(Self, [Wan; 2])> {
        let mut wans = Vec::new();
        let net = Self::of(|lab, internet, name| {
            let host = lab.host(name)?;
            wans.push(host.join_through_wan(internet, seed.wrapping_add(wans.len() as u64))?);
            Ok(host)
        })?;
        let wans = <[Wan; 2]>::try_from(wans).ok().context("invariant: a box for each leaf")?;
        Ok((net, wans))
    }

    fn of(mut leaf: impl FnMut(&Lab, &Lan, &str) -> Result<Host>) -> Result<Self> {
        let (lab, internet) = internet()?;
        let transits = [reachable(&lab, &internet, "t1")?, reachable(&lab, &internet, "t2")?];
        let mut leaf = |name: &str| {
            let site = Site::init(&leaf(&lab, &internet, name)?, &["--no-listen"])?;
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

/// A reachable site, and one behind a WAN box, linked to it.
#[derive(Debug)]
pub struct Away {
    /// The network.
    pub lab: Lab,
    /// The reachable site.
    pub hub: Site,
    /// The other one.
    pub branch: Site,
    /// The way between them.
    pub wan: Wan,
}

impl Away {
    /// With the seed of the WAN box.
    ///
    /// # Errors
    /// When anything fails.
    pub fn new(seed: u64) -> Result<Self> {
        Self::with_mtu(seed, 1_500)
    }

    /// The same with interfaces of another size.
    ///
    /// # Errors
    /// When anything fails.
    pub fn with_mtu(seed: u64, mtu: u16) -> Result<Self> {
        let (lab, internet) = internet()?;
        let hub = reachable(&lab, &internet, "hub")?;
        let host = lab.host("branch")?;
        let wan = host.join_through_wan(&internet, seed)?;
        host.set_mtu(&internet, mtu)?;
        hub.host().set_mtu(&internet, mtu)?;
        let branch = Site::init(&host, &["--no-listen"])?;
        branch.link_to(&hub, &[])?;
        branch.wait_links_up(1)?;
        Ok(Self { lab, hub, branch, wan })
    }

    /// The link as the branch shows it.
    ///
    /// # Errors
    /// When there is none.
    pub fn link(&self) -> Result<Value> {
        self.branch.first_link()
    }

    /// Waits until the link is as `check` wants it.
    ///
    /// # Errors
    /// When it does not become so.
    pub fn wait_link(&self, what: &str, check: impl Fn(&Value) -> bool) -> Result<Shown> {
        self.branch.watch_link(what, Duration::from_secs(10), check)
    }
}
