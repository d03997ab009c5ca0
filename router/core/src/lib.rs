//! Pure routing logic of the Skein router.
//!
//! This crate never opens a socket, reads a clock, spawns a task or draws a random number: events, the time and
//! randomness are arguments, decisions are return values. It does not know the encoding of anything.

mod address;
mod fib;
mod id;

pub use address::{ADDRESS_LEN_MAX, Address, AddressEntry, AddressError, Port, Protocol, Strategy};
pub use fib::{Fib, LABELS_MAX, Path, Provider, Route};
pub use id::{Handle, Label, LinkId, PINS_MAX, Pin, RouterId, SiteId, parse_vaddr, vaddr};
