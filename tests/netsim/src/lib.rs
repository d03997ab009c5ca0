//! A simulated network: hosts with UDP, TCP and Unix sockets, paths and NATs with faults, in virtual time and from one seed.
//!
//! Each [`Process`] has a runtime of its own with a paused clock; [`Net::run_until`] steps them in turn, a tick at a time, so that
//! processes can be killed, as by `kill -9`, by dropping their runtime, and frozen by not stepping it. While a process runs it is
//! *current* on its thread, so that code which knows nothing of the simulation finds its host ([`current`]). The model of a kernel
//! is as simple as it can be while programs see what they would see: bounded buffers, FIN and RST in order, ports, backlogs.
//!
//! Nothing here depends on the time of day, on addresses in memory or on the order of a hash table: one seed, one history.

mod conn;
mod nat;
mod net;
mod path;
mod process;
mod stream;
mod trace;
mod udp;
mod world;

pub use net::{Counts, Host, Net, Sockets, current, unix_ms};
pub use path::{LATENCY_US_MIN, Path};
pub use process::Process;
pub use stream::{OwnedReadHalf, OwnedWriteHalf, TcpListener, TcpStream, UnixListener, UnixStream};
pub use udp::{Received, UdpSocket};
