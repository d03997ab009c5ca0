//! Which router a flow leaves at.

use crate::{Address, Fib, Port, Provider, RouterId, Strategy};
use std::collections::BTreeMap;

/// Why a provider was or was not chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Chosen.
    Chosen,
    /// Does not serve the port.
    PortNotServed,
    /// Tried before for this flow.
    Excluded,
    /// A provider at this router comes first.
    LocalFirst,
    /// Its path metric is larger.
    Farther,
    /// It has more outstanding flows and cost.
    Busier,
    /// Its priority number is higher.
    LowerPriority,
    /// Its weight is 0.
    NoWeight,
    /// As good as the chosen one, whose turn it is.
    OtherTurn,
}

impl Verdict {
    /// For people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chosen => "chosen",
            Self::PortNotServed => "does not serve this port",
            Self::Excluded => "already tried for this flow",
            Self::LocalFirst => "a connector at this router comes first",
            Self::Farther => "farther away",
            Self::Busier => "more outstanding flows and cost",
            Self::LowerPriority => "lower priority",
            Self::NoWeight => "weight is 0",
            Self::OtherTurn => "equally good, another's turn",
        }
    }
}

/// What a flow asks for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The address.
    pub address: &'a Address,
    /// The port; `None` for whichever is served.
    pub port: Option<Port>,
    /// Routers tried before.
    pub excluded: &'a [RouterId],
}

/// Candidates for a flow and the one it goes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice<'a> {
    /// How the providers want to be chosen; `None` without providers.
    pub strategy: Option<Strategy>,
    /// Every provider of the address with its verdict, in order of metric.
    pub candidates: Vec<(&'a Provider, Verdict)>,
}

impl<'a> Choice<'a> {
    /// The provider the flow goes to.
    #[must_use]
    pub fn chosen(&self) -> Option<&'a Provider> {
        self.candidates.iter().find(|(_, verdict)| *verdict == Verdict::Chosen).map(|(p, _)| *p)
    }
}

/// Chooses among the reachable providers of an address.
///
/// `outstanding` tells how many flows this ingress has open to a router; `turn` goes up by one with each flow:
/// equals take turns.
#[must_use]
pub fn choose<'a>(
    fib: &'a Fib,
    wanted: Wanted<'_>,
    outstanding: &dyn Fn(RouterId) -> u64,
    turn: u64,
) -> Choice<'a> {
    let providers = fib.addresses.get(wanted.address).map_or(&[][..], |providers| providers);
    let mut verdicts: Vec<Option<Verdict>> =
        providers.iter().map(|provider| ineligible(provider, wanted)).collect();
    let eligible: Vec<usize> = (0..providers.len()).filter(|&i| verdicts[i].is_none()).collect();
    let strategy = strategy(providers);
    if let Some(strategy) = strategy {
        let at_hand = |i: &&usize| fib.is_local(providers[**i].router);
        let (chosen, others) = match eligible.iter().find(at_hand) {
            Some(&local) => (Some(local), Verdict::LocalFirst),
            None => by_strategy(strategy, providers, &eligible, outstanding, turn, &mut verdicts),
        };
        for i in eligible {
            let verdict = if Some(i) == chosen { Verdict::Chosen } else { others };
            verdicts[i].get_or_insert(verdict);
        }
    }
    let verdicts = verdicts.into_iter().map(|v| v.unwrap_or(Verdict::OtherTurn));
    Choice { strategy, candidates: providers.iter().zip(verdicts).collect() }
}

fn ineligible(provider: &Provider, wanted: Wanted<'_>) -> Option<Verdict> {
    if wanted.port.is_some_and(|port| !provider.entry.ports.contains(&port)) {
        Some(Verdict::PortNotServed)
    } else if wanted.excluded.contains(&provider.router) {
        Some(Verdict::Excluded)
    } else {
        None
    }
}

/// The most common strategy among providers, ties to the smallest.
fn strategy(providers: &[Provider]) -> Option<Strategy> {
    let mut votes = BTreeMap::<Strategy, usize>::new();
    for provider in providers {
        *votes.entry(provider.entry.strategy).or_default() += 1;
    }
    let most = votes.values().copied().max()?;
    votes.into_iter().find(|&(_, count)| count == most).map(|(strategy, _)| strategy)
}

/// The index chosen and the verdict on eligible others that got none.
fn by_strategy(
    strategy: Strategy,
    providers: &[Provider],
    eligible: &[usize],
    outstanding: &dyn Fn(RouterId) -> u64,
    turn: u64,
    verdicts: &mut [Option<Verdict>],
) -> (Option<usize>, Verdict) {
    match strategy {
        Strategy::Closest => {
            let metric = |&i: &usize| providers[i].metric_us;
            let Some(least) = eligible.iter().map(metric).min() else {
                return (None, Verdict::Farther);
            };
            let nearest =
                retain(eligible, verdicts, Verdict::Farther, |i| providers[i].metric_us == least);
            (pick(&nearest, turn), Verdict::OtherTurn)
        }
        Strategy::Balanced => balanced(providers, eligible, outstanding, turn, verdicts),
        Strategy::Priority => {
            let Some(first) = eligible.iter().map(|&i| providers[i].entry.priority).min() else {
                return (None, Verdict::LowerPriority);
            };
            let first = retain(eligible, verdicts, Verdict::LowerPriority, |i| {
                providers[i].entry.priority == first
            });
            balanced(providers, &first, outstanding, turn, verdicts)
        }
        Strategy::Weighted => weighted(providers, eligible, turn, verdicts),
    }
}

/// The least loaded; a link of cost 1 on the way weighs as much as one outstanding flow. Measured times do not count: their noise
/// would decide where flows are few.
fn balanced(
    providers: &[Provider],
    eligible: &[usize],
    outstanding: &dyn Fn(RouterId) -> u64,
    turn: u64,
    verdicts: &mut [Option<Verdict>],
) -> (Option<usize>, Verdict) {
    let load = |i: usize| outstanding(providers[i].router).saturating_add(providers[i].cost);
    let Some(least) = eligible.iter().map(|&i| load(i)).min() else {
        return (None, Verdict::Busier);
    };
    let best = retain(eligible, verdicts, Verdict::Busier, |i| load(i) == least);
    (pick(&best, turn), Verdict::OtherTurn)
}

/// In proportion to weights; evenly when all are 0.
fn weighted(
    providers: &[Provider],
    eligible: &[usize],
    turn: u64,
    verdicts: &mut [Option<Verdict>],
) -> (Option<usize>, Verdict) {
    let weight = |i: usize| u64::from(providers[i].entry.weight);
    let total: u64 = eligible.iter().map(|&i| weight(i)).sum();
    if total == 0 {
        return (pick(eligible, turn), Verdict::OtherTurn);
    }
    let heavy = retain(eligible, verdicts, Verdict::NoWeight, |i| weight(i) > 0);
    let mut left = turn % total;
    let drawn = heavy.into_iter().find(|&i| {
        let hit = left < weight(i);
        left = left.saturating_sub(weight(i));
        hit
    });
    (drawn, Verdict::OtherTurn)
}

/// The eligible that pass; the others get `verdict`.
fn retain(
    eligible: &[usize],
    verdicts: &mut [Option<Verdict>],
    verdict: Verdict,
    passes: impl Fn(usize) -> bool,
) -> Vec<usize> {
    let (pass, fail): (Vec<_>, Vec<_>) = eligible.iter().partition(|&&i| passes(i));
    for i in fail {
        verdicts[i] = Some(verdict);
    }
    pass
}

fn pick(among: &[usize], turn: u64) -> Option<usize> {
    let count = u64::try_from(among.len()).ok().filter(|&count| count > 0)?;
    among.get(usize::try_from(turn % count).ok()?).copied()
}

#[cfg(test)]
mod tests;
