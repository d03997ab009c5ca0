//! Lets things go wrong in a run, and mends them.

use crate::{
    run::Run,
    scenario::{Fault, LinkPlan, What},
};
use anyhow::Result;
use skein_netsim::{Path, Process};
use std::time::Duration;
use tokio::task::JoinHandle;

/// Flows that have not ended by then are reset when a site leaves.
const DRAINS: Duration = Duration::from_millis(500);
/// A site that leaves has left after this.
const LEAVES_MS: u64 = 3_000;

/// The router of a site that says farewell.
pub(crate) struct Leaving {
    site: usize,
    pub(crate) process: Process,
    drain: JoinHandle<u64>,
    until_ms: u64,
}

impl Run<'_> {
    /// Begins or ends a fault. What another one still spoils stays spoilt.
    pub(crate) fn change(&mut self, fault: &Fault, begins: bool) -> Result<()> {
        if begins {
            self.active.push(fault.clone());
        } else if let Some(at) = self.active.iter().position(|active| active == fault) {
            self.active.remove(at);
        }
        match fault.what {
            What::Kill { site, loses_disk } => {
                self.take_router(site, begins)?;
                if loses_disk && begins {
                    self.sites[site].lose_disk();
                }
            }
            What::Withdraw { site } => {
                self.withdrawn[site] = true;
                self.take_router(site, begins)?;
                self.sites[site].shared.change(|brain| brain.resources.connectors.clear());
            }
            What::PowerLoss { site } => self.power(site, begins)?,
            What::Freeze { site } => {
                let is_frozen =
                    self.ails(|what| matches!(what, What::Freeze { site: s } if *s == site));
                if let Some(process) = self.sites[site].process() {
                    process.set_frozen(is_frozen);
                }
            }
            What::ControllerAway { site } => self.controller(site)?,
            What::DiskFull { site } => {
                let is_full =
                    self.ails(|what| matches!(what, What::DiskFull { site: s } if *s == site));
                self.sites[site].set_disk_full(is_full)?;
            }
            What::Clock { site, .. } => self.set_clock(site),
            What::NatExpiry { site, .. } => self.set_nat_expiry(site),
            What::Rebind { site } => self.sites[site].host.rebind_nat(),
            What::Leave { site } => {
                if begins {
                    self.leave(site);
                }
            }
            What::Cut { .. }
            | What::OneWay { .. }
            | What::UdpBlocked { .. }
            | What::Degraded { .. }
            | What::Mtu { .. }
            | What::Partition { .. } => self.set_paths(),
        }
        Ok(())
    }

    /// Whether something of that kind goes on.
    fn ails(&self, is: impl Fn(&What) -> bool) -> bool {
        self.active.iter().any(|fault| is(&fault.what))
    }

    fn set_clock(&self, site: usize) {
        let set = self.active.iter().rev().find_map(|fault| match fault.what {
            What::Clock { site: s, ahead_ms } if s == site => Some(ahead_ms),
            _ => None,
        });
        let ahead_ms = set.unwrap_or(self.scenario.sites[site].clock_ahead_ms);
        self.sites[site].host.set_wall_offset_ms(ahead_ms);
    }

    fn set_nat_expiry(&self, site: usize) {
        let set = self.active.iter().rev().find_map(|fault| match fault.what {
            What::NatExpiry { site: s, expiry_ms } if s == site => Some(expiry_ms),
            _ => None,
        });
        if let Some(expiry_ms) = set.or(self.scenario.sites[site].nat_expiry_ms) {
            self.sites[site].host.set_nat_expiry(expiry_ms * 1_000);
        }
    }

    /// Makes every path what it is by nature and what goes wrong now.
    fn set_paths(&self) {
        for (index, plan) in self.scenario.links.iter().enumerate() {
            for is_backwards in [false, true] {
                let mut path = plan.path.clone();
                for fault in &self.active {
                    spoil(&mut path, &fault.what, (index, plan, is_backwards));
                }
                let [from, to] = [plan.from, plan.to].map(|site| &self.sites[site].host);
                let (from, to) = if is_backwards { (to, from) } else { (from, to) };
                self.net.change_path(from, to, |now| *now = path);
            }
        }
    }

    fn take_router(&mut self, index: usize, begins: bool) -> Result<()> {
        let now_ms = self.net.now_us() / 1_000;
        let is_down = self.ails(|what| match *what {
            What::Kill { site, .. } | What::Withdraw { site } | What::PowerLoss { site } => {
                site == index
            }
            _ => false,
        });
        let site = &mut self.sites[index];
        if begins {
            if site.router().is_some() {
                self.kills_ms.push((index, now_ms));
            }
            site.kill_router();
            site.shared.forget_status();
            self.leaving.retain(|leaving| leaving.site != index);
        } else if site.router().is_none() && !self.gone[index] && !is_down {
            // A full disk keeps a router from starting; its supervisor would try again and again.
            site.set_disk_full(false)?;
            site.start_router()?;
        }
        Ok(())
    }

    fn power(&mut self, index: usize, begins: bool) -> Result<()> {
        if begins {
            self.sites[index].host.lose_power();
        } else if !self.has_power(index) {
            return Ok(());
        } else {
            self.sites[index].host.power_on();
            self.start_targets(index)?;
        }
        self.controller(index)?;
        self.take_router(index, begins)
    }

    fn has_power(&self, index: usize) -> bool {
        !self.ails(|what| *what == What::PowerLoss { site: index })
    }

    /// Starts or kills a controller.
    fn controller(&mut self, index: usize) -> Result<()> {
        let is_away = self.ails(|what| *what == What::ControllerAway { site: index });
        let is_up = self.has_power(index) && !is_away;
        let site = &mut self.sites[index];
        if !is_up {
            site.kill_controller();
        } else if !site.has_controller() {
            self.desk_process.run(|| site.start_controller())?;
        }
        Ok(())
    }

    /// The site says farewell, and has left some time later.
    fn leave(&mut self, index: usize) {
        let now_ms = self.net.now_us() / 1_000;
        self.kills_ms.push((index, now_ms));
        self.gone[index] = true;
        let Some((router, process)) = self.sites[index].take_router() else { return };
        let drain = process.handle().spawn(async move { router.drain(DRAINS, true).await });
        self.leaving.push(Leaving { site: index, process, drain, until_ms: now_ms + LEAVES_MS });
    }

    /// Ends the routers of sites that have left.
    pub(crate) fn forget_left(&mut self) {
        let now_ms = self.net.now_us() / 1_000;
        self.leaving.retain(|leaving| {
            let stays = !leaving.drain.is_finished() && now_ms < leaving.until_ms;
            if !stays {
                self.sites[leaving.site].shared.forget_status();
            }
            stays
        });
    }
}

/// What becomes of a path, in one of the directions of a link, when something goes wrong.
fn spoil(path: &mut Path, what: &What, (index, plan, is_backwards): (usize, &LinkPlan, bool)) {
    match *what {
        What::Cut { link } if link == index => path.is_cut = true,
        What::OneWay { link, backwards } if link == index => {
            path.is_cut |= backwards == is_backwards
        }
        What::Partition { below } => path.is_cut |= (plan.from < below) != (plan.to < below),
        What::UdpBlocked { link } if link == index => path.blocks_udp = true,
        What::Mtu { link, mtu } if link == index => path.mtu = mtu,
        What::Degraded {
            link,
            loss_permille,
            burst_permille,
            reorder_permille,
            duplicate_permille,
            jitter_us,
        } if link == index => {
            path.loss_permille = loss_permille;
            path.burst_permille = burst_permille;
            path.reorder_permille = reorder_permille;
            path.duplicate_permille = duplicate_permille;
            path.jitter_us = jitter_us;
        }
        _ => {}
    }
}
