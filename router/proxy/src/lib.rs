//! HTTP proxies that tunnel TCP (CONNECT): how one is configured, which endpoints it is for, and the tunnel itself.
//!
//! Nothing here makes sockets: whoever wants a tunnel brings a connection to the proxy.

mod bypass;
mod config;
mod environment;
mod tunnel;

pub use bypass::Bypass;
pub use config::{ConfigError, Credentials, Proxy, Url, UrlError};
pub use environment::hide_proxies;
pub use tunnel::{Tunnel, TunnelError};
