//! Lets things go wrong in a run, and mends them.

use crate::{
    run::Run,
    scenario::{Fault, What},
    site::Site,
};
use anyhow::Result;
use std::time::Duration;

/// A killed controller's socket is closed after this.
const CLOSES_MS: u64 = 10;

impl Run<'_> {
    /// Begins or ends a fault.
    pub(crate) fn change(&mut self, fault: &Fault, begins: bool) -> Result<()> {
        let now_ms = self.net.now_us() / 1_000;
        match &fault.what {
            What::Kill { site, loses_disk } => {
                self.take_router(*site, begins)?;
                if *loses_disk && begins {
                    self.sites[*site].lose_disk();
                }
            }
            What::Withdraw { site } => {
                self.withdrawn[*site] = true;
                self.take_router(*site, begins)?;
                self.sites[*site].shared.change(|brain| brain.resources.connectors.clear());
            }
            What::PowerLoss { site } => self.power(*site, begins)?,
            What::Freeze { site } => {
                if let Some(process) = self.sites[*site].process() {
                    process.set_frozen(begins);
                }
            }
            What::ControllerAway { site } => {
                if begins {
                    self.sites[*site].kill_controller();
                } else if !self.sites[*site].has_controller() {
                    // The old socket is closed when its task has run, which it has not if time passed over the fault while a site left.
                    self.pass_until(now_ms + CLOSES_MS);
                    let site = &mut self.sites[*site];
                    self.desk_process.run(|| site.start_controller())?;
                }
            }
            What::DiskFull { site } => self.sites[*site].set_disk_full(begins)?,
            What::Clock { site, ahead_ms } => {
                let plan = &self.scenario.sites[*site];
                let ahead_ms = if begins { *ahead_ms } else { plan.clock_ahead_ms };
                self.sites[*site].host.set_wall_offset_ms(ahead_ms);
            }
            What::NatExpiry { site, expiry_ms } => {
                let usual_ms = self.scenario.sites[*site].nat_expiry_ms.unwrap_or(*expiry_ms);
                let expiry_ms = if begins { *expiry_ms } else { usual_ms };
                self.sites[*site].host.set_nat_expiry(expiry_ms * 1_000);
            }
            What::Rebind { site } => self.sites[*site].host.rebind_nat(),
            What::Leave { site } => {
                if begins {
                    self.leave(*site, now_ms);
                }
            }
            What::Partition { below } => {
                for link in self.scenario.links.iter() {
                    if (link.from < *below) != (link.to < *below) {
                        self.change_link(link.from, link.to, |path| path.is_cut = begins);
                    }
                }
            }
            _ => self.change_path(fault, begins),
        }
        Ok(())
    }

    fn change_path(&self, fault: &Fault, begins: bool) {
        let (What::Cut { link }
        | What::OneWay { link, .. }
        | What::UdpBlocked { link }
        | What::Degraded { link, .. }
        | What::Mtu { link, .. }) = fault.what
        else {
            return;
        };
        let plan = &self.scenario.links[link];
        let original = &plan.path;
        match &fault.what {
            What::OneWay { backwards, .. } => {
                let (from, to) =
                    if *backwards { (plan.to, plan.from) } else { (plan.from, plan.to) };
                let (from, to) = (&self.sites[from].host, &self.sites[to].host);
                self.net.change_path(from, to, |path| path.is_cut = begins);
            }
            what => self.change_link(plan.from, plan.to, |path| match what {
                What::Cut { .. } => path.is_cut = begins,
                What::UdpBlocked { .. } => path.blocks_udp = begins,
                What::Mtu { mtu, .. } => path.mtu = if begins { *mtu } else { original.mtu },
                What::Degraded {
                    loss_permille,
                    burst_permille,
                    reorder_permille,
                    duplicate_permille,
                    jitter_us,
                    ..
                } => {
                    let of = |bad: u16| if begins { bad } else { 0 };
                    path.loss_permille =
                        if begins { *loss_permille } else { original.loss_permille };
                    path.burst_permille = of(*burst_permille);
                    path.reorder_permille = of(*reorder_permille);
                    path.duplicate_permille = of(*duplicate_permille);
                    path.jitter_us = if begins { *jitter_us } else { original.jitter_us };
                }
                _ => {}
            }),
        }
    }

    fn change_link(&self, a: usize, b: usize, change: impl Fn(&mut skein_netsim::Path)) {
        let (a, b) = (&self.sites[a].host, &self.sites[b].host);
        self.net.change_path(a, b, &change);
        self.net.change_path(b, a, &change);
    }

    fn take_router(&mut self, index: usize, begins: bool) -> Result<()> {
        let now_ms = self.net.now_us() / 1_000;
        let site = &mut self.sites[index];
        if begins {
            if site.router().is_some() {
                self.kills_ms.push((index, now_ms));
            }
            site.kill_router();
            site.shared.forget_status();
        } else if site.router().is_none() && !self.gone[index] {
            // A full disk keeps a router from starting; its supervisor would try again and again.
            site.set_disk_full(false)?;
            site.start_router()?;
        }
        Ok(())
    }

    fn power(&mut self, index: usize, begins: bool) -> Result<()> {
        if begins {
            self.sites[index].host.lose_power();
            self.sites[index].kill_controller();
            return self.take_router(index, true);
        }
        self.sites[index].host.power_on();
        self.start_targets(index)?;
        let site = &mut self.sites[index];
        if !site.has_controller() {
            self.desk_process.run(|| site.start_controller())?;
        }
        self.take_router(index, false)
    }

    /// The site says farewell; what becomes of it is over when time has passed.
    fn leave(&mut self, index: usize, now_ms: u64) {
        self.kills_ms.push((index, now_ms));
        self.gone[index] = true;
        let Some((router, mut process)) = self.sites[index].take_router() else { return };
        let flows_max = Duration::from_millis(500);
        let drain = process.handle().spawn(async move { router.drain(flows_max, true).await });
        // The others go on meanwhile.
        let until_ms = now_ms + 3_000;
        while self.net.now_us() / 1_000 < until_ms && !drain.is_finished() {
            let next_us = self.net.now_us() + self.tick_us;
            let mut processes = vec![&mut self.desk_process, &mut process];
            processes.extend(self.sites.iter_mut().filter_map(Site::process));
            self.net.run_until(next_us, self.tick_us, &mut processes);
        }
        self.sites[index].shared.forget_status();
    }
}
