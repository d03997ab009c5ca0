//! A LAN: a bridge in the lab's own network namespace.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Result, ensure};

use crate::Inner;

/// Host numbers given out on a LAN start here; below are routers.
const FIRST_HOST_NUMBER: u8 = 10;

/// An Ethernet and the /24 on it.
#[derive(Clone, Debug)]
pub struct Lan {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    lab: Arc<Inner>,
    name: String,
    index: u8,
    network: Ipv4Addr,
    next: AtomicU8,
}

impl Lan {
    pub(crate) fn new(lab: Arc<Inner>, name: &str, index: u8, network: Ipv4Addr) -> Result<Self> {
        ensure!(network.octets()[3] == 0, "{network} is no /24");
        lab.core.network_script(&format!(
            "ip link add br{index} type bridge; ip link set br{index} up"
        ))?;
        let next = AtomicU8::new(FIRST_HOST_NUMBER);
        let shared = Shared { lab, name: name.to_owned(), index, network, next };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// As given to the lab.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Where hosts send what is for elsewhere.
    #[must_use]
    pub fn router_address(&self) -> Ipv4Addr {
        self.address(1)
    }

    pub(crate) fn make_bridge_the_router(&self) -> Result<()> {
        let (address, index) = (self.router_address(), self.shared.index);
        self.shared.lab.core.network_script(&format!("ip address add {address}/24 dev br{index}"))
    }

    pub(crate) fn index(&self) -> u8 {
        self.shared.index
    }

    pub(crate) fn next_address(&self) -> Ipv4Addr {
        self.address(self.shared.next.fetch_add(1, Ordering::Relaxed))
    }

    fn address(&self, number: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.shared.network.octets();
        Ipv4Addr::new(a, b, c, number)
    }
}
