//! Makes a failing scenario smaller while it fails in the same way.

use crate::{
    run::Outcome,
    scenario::{Fault, Scenario, What},
};
use anyhow::Result;

/// A kind of failure: its words without what differs from run to run.
#[must_use]
pub fn kind(failure: &str) -> String {
    let words = failure.split_whitespace().filter(|word| word.chars().all(|c| c.is_alphabetic()));
    words.take(8).collect::<Vec<_>>().join(" ")
}

/// Removes faults, flows, services, links and sites as long as what is left fails like before in `run`.
///
/// # Errors
/// A scenario cannot be set up.
pub fn shrink(scenario: &Scenario, run: impl Fn(&Scenario) -> Result<Outcome>) -> Result<Scenario> {
    let failure = |scenario: &Scenario| -> Result<Option<String>> {
        Ok(run(scenario)?.failures.first().map(|failure| kind(failure)))
    };
    let Some(kind) = failure(scenario)? else { return Ok(scenario.clone()) };
    let mut smallest = scenario.clone();
    loop {
        let mut has_shrunk = false;
        for smaller in candidates(&smallest) {
            if failure(&smaller)?.as_ref() == Some(&kind) {
                smallest = smaller;
                has_shrunk = true;
                break;
            }
        }
        if !has_shrunk {
            return Ok(smallest);
        }
    }
}

/// Everything that is smaller by one step, the largest steps first.
fn candidates(scenario: &Scenario) -> Vec<Scenario> {
    let mut out = Vec::new();
    let (flows, faults) = (scenario.flows.len(), scenario.faults.len());
    for half in [0..faults / 2, faults / 2..faults] {
        if half.len() > 1 {
            let mut smaller = scenario.clone();
            drop(smaller.faults.drain(half));
            out.push(smaller);
        }
    }
    for half in [0..flows / 2, flows / 2..flows] {
        if half.len() > 1 {
            let mut smaller = scenario.clone();
            drop(smaller.flows.drain(half));
            out.push(smaller);
        }
    }
    out.extend((1..scenario.sites.len()).rev().map(|site| without_site(scenario, site)));
    out.extend((0..scenario.links.len()).map(|link| without_link(scenario, link)));
    for index in 0..faults {
        let mut smaller = scenario.clone();
        smaller.faults.remove(index);
        out.push(smaller);
    }
    for index in 0..flows {
        let mut smaller = scenario.clone();
        smaller.flows.remove(index);
        out.push(smaller);
    }
    for index in 0..scenario.associations.len() {
        let mut smaller = scenario.clone();
        smaller.associations.remove(index);
        out.push(smaller);
    }
    out.retain(is_sound);
    out
}

fn without_site(scenario: &Scenario, gone: usize) -> Scenario {
    let mut smaller = scenario.clone();
    for link in (0..scenario.links.len()).rev() {
        if scenario.links[link].from == gone || scenario.links[link].to == gone {
            smaller = without_link(&smaller, link);
        }
    }
    smaller.sites.remove(gone);
    smaller.services.retain(|service| service.site != gone);
    smaller.flows.retain(|flow| flow.site != gone);
    smaller.associations.retain(|association| association.site != gone);
    smaller.faults.retain(|fault| fault.site() != Some(gone));
    let renumber = |site: &mut usize| *site -= usize::from(*site > gone);
    smaller.links.iter_mut().for_each(|link| {
        renumber(&mut link.from);
        renumber(&mut link.to);
    });
    smaller.services.iter_mut().for_each(|service| renumber(&mut service.site));
    smaller.flows.iter_mut().for_each(|flow| renumber(&mut flow.site));
    smaller.associations.iter_mut().for_each(|association| renumber(&mut association.site));
    smaller.faults.iter_mut().filter_map(Fault::site_mut).for_each(renumber);
    smaller
}

fn without_link(scenario: &Scenario, gone: usize) -> Scenario {
    let mut smaller = scenario.clone();
    smaller.links.remove(gone);
    smaller.faults.retain(|fault| fault.link() != Some(gone));
    for link in smaller.faults.iter_mut().filter_map(Fault::link_mut) {
        *link -= usize::from(*link > gone);
    }
    smaller
}

/// Whether all sites hang together, and every flow has somewhere to go.
fn is_sound(scenario: &Scenario) -> bool {
    let mut reached = vec![false; scenario.sites.len()];
    reached[0] = true;
    for _ in 0..scenario.sites.len() {
        for link in &scenario.links {
            let is_either = reached[link.from] || reached[link.to];
            (reached[link.from], reached[link.to]) = (is_either, is_either);
        }
    }
    let is_served = |address| scenario.services.iter().any(|service| service.address == address);
    reached.into_iter().all(|reached| reached)
        && scenario.flows.iter().all(|flow| is_served(flow.address))
        && scenario.associations.iter().all(|association| is_served(association.address))
}

impl Fault {
    pub(crate) fn site(&self) -> Option<usize> {
        self.clone().site_mut().copied()
    }

    fn site_mut(&mut self) -> Option<&mut usize> {
        match &mut self.what {
            What::Kill { site, .. }
            | What::Withdraw { site }
            | What::PowerLoss { site }
            | What::Freeze { site }
            | What::ControllerAway { site }
            | What::DiskFull { site }
            | What::Rebind { site }
            | What::NatExpiry { site, .. }
            | What::Clock { site, .. }
            | What::Leave { site } => Some(site),
            _ => None,
        }
    }

    pub(crate) fn link(&self) -> Option<usize> {
        self.clone().link_mut().copied()
    }

    fn link_mut(&mut self) -> Option<&mut usize> {
        match &mut self.what {
            What::Cut { link }
            | What::OneWay { link, .. }
            | What::UdpBlocked { link }
            | What::Degraded { link, .. }
            | What::Mtu { link, .. } => Some(link),
            _ => None,
        }
    }
}
