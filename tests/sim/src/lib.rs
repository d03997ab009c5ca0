//! Whole networks of production routers in virtual time, from one seed: faults, oracles, replay, shrinking.
//!
//! See `docs/simulation.md`.
#![allow(clippy::cast_possible_truncation, reason = "numbers of a scenario are small")]

mod apart;
mod association;
mod controller;
mod entropy;
mod fault;
mod flow;
mod oracle;
mod passage;
mod run;
mod scenario;
mod shrink;
mod site;
mod stall;

pub use apart::run_apart;
pub use run::{Outcome, VirtualTime, run};
pub use scenario::{
    AssociationPlan, Fault, FlowPlan, LinkPlan, Scenario, Script, ServicePlan, SitePlan, What,
};
pub use shrink::{kind, shrink};
