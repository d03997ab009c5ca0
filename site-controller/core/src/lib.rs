//! Pure planning of a site: desired and observed state in, router configuration, statements to issue and status documents out.
//!
//! No I/O, no clock, no randomness: the time is an argument, everything else a value.

mod admission;
mod doctor;
mod endpoint;
mod grant;
mod plan;
mod renewal;
mod resources;
pub mod status;

pub use admission::{LeftOut, Services, automatic_room};
pub use doctor::{Observations, PeerClock, diagnose};
pub use endpoint::{
    AutoEndpoint, AutoEndpoints, AutoPort, FALLBACK_PORT_FIRST, FALLBACK_PORT_LAST, LocalPorts,
    assign, forget_unused,
};
pub use grant::{Admission, Grant, GrantRefusal, Redemption, Terms};
pub use plan::{Draining, Inputs, Plan, listener_name, plan};
pub use renewal::{Due, Endorsed, IssuedStatement, RENEW_AFTER_S, due, next_counter};
pub use resources::{Conflict, Resources};
