//! Transits of a diamond that fail.

use std::time::Duration;

use anyhow::{Result, ensure};
use skein_lab::{Host, Signal, eventually};

use crate::{Site, topology::Diamond};

/// A link without traffic is given up after two probe intervals, and what a site says of it is up to a quarter of a second old: as long as one
/// end has given it up and its word was lost, the other still shows it as up.
const BELIEVED_MAX: Duration = Duration::from_millis(2_500);

/// How a transit fails.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The router is killed; its controller starts another.
    Kill,
    /// All its processes are killed and started again.
    Reboot,
    /// The router does not run for a while.
    Freeze,
    /// Nothing passes between it and the leaves.
    Cut,
    /// Nothing reaches it from one leaf.
    CutTowards,
    /// Nothing reaches the other leaf from it.
    CutFrom,
}

/// All of them.
pub const FAULTS: [Fault; 6] =
    [Fault::Kill, Fault::Reboot, Fault::Freeze, Fault::Cut, Fault::CutTowards, Fault::CutFrom];

/// Lets a transit fail for as long as everybody needs to notice, and undoes it.
///
/// # Errors
/// When it cannot be brought about or undone.
pub fn fail(net: &Diamond, transit: &Site, fault: Fault) -> Result<()> {
    let outage = Duration::from_millis(1500);
    let host = transit.host();
    let cut = |from: &Host, to: &Host| -> Result<()> {
        net.lab.cut_one_way(from, to)?;
        std::thread::sleep(outage);
        net.lab.heal(from, to)
    };
    match fault {
        Fault::Kill => {
            let before = transit.processes()?.router;
            host.signal(before, Signal::Kill)?;
            // Until then everybody may still believe in the old one.
            eventually("a new router", Duration::from_secs(20), || {
                Ok(transit.processes()?.router != before)
            })
            .map(drop)
        }
        Fault::Reboot => {
            host.power_cut()?;
            transit.skctl(&["start"]).check().map(drop)
        }
        Fault::Freeze => {
            transit.signal_router(Signal::Freeze)?;
            std::thread::sleep(outage);
            let listing = host.command("sh").args(["-c", "kill -CONT -1"]).run()?;
            ensure!(listing.code == Some(0), "{listing}");
            Ok(())
        }
        Fault::Cut => {
            net.lab.cut(net.a.host(), host)?;
            net.lab.cut(net.b.host(), host)?;
            std::thread::sleep(outage);
            net.lab.heal(net.a.host(), host)?;
            net.lab.heal(net.b.host(), host)
        }
        Fault::CutTowards => cut(net.a.host(), host),
        Fault::CutFrom => cut(host, net.b.host()),
    }
}

/// Waits, once a fault is undone, until all links are up: the next transit may fail only when the last one carries again.
///
/// # Errors
/// When they do not come up.
pub fn recovered(net: &Diamond) -> Result<()> {
    std::thread::sleep(BELIEVED_MAX);
    net.a.wait_links_up(2)?;
    net.b.wait_links_up(2)?;
    for transit in &net.transits {
        transit.wait_links_up(3)?;
    }
    Ok(())
}
