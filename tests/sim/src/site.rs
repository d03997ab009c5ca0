//! A simulated site: a production router in a process of its own, and a controller that plans as the production one does.

use crate::controller::{self, Brain, Shared};
use anyhow::{Context as _, Result};
use skein_core::SiteId;
use skein_netsim::{Host, Process, Sockets};
use skein_router_sim::{Config, ControllerAddress, Router, Runtimes};
use std::{path::PathBuf, sync::Arc};
use tokio_util::sync::CancellationToken;

/// A site and its processes.
pub(crate) struct Site {
    pub(crate) index: usize,
    pub(crate) host: Host,
    pub(crate) shared: Arc<Shared>,
    dir: PathBuf,
    router: Option<(Router, Process)>,
    controller: Option<CancellationToken>,
    boots: u64,
    seed: u64,
}

impl Site {
    pub(crate) fn new(index: usize, seed: u64, host: Host, brain: Brain, dir: PathBuf) -> Self {
        let shared = Arc::new(Shared::new(brain));
        Self { index, host, shared, dir, router: None, controller: None, boots: 0, seed }
    }

    pub(crate) fn id(&self) -> SiteId {
        self.shared.id()
    }

    fn socket(&self) -> PathBuf {
        // The same in every run: it is part of the configuration that routers are sent.
        PathBuf::from(format!("/site-{}/control.sock", self.index))
    }

    /// Starts the controller, on the runtime that is entered.
    pub(crate) fn start_controller(&mut self) -> Result<()> {
        let stop = CancellationToken::new();
        controller::serve(&self.host, &self.socket(), Arc::clone(&self.shared), stop.clone())
            .context("the controller's socket")?;
        self.controller = Some(stop);
        Ok(())
    }

    /// Ends the controller as by `kill -9`.
    pub(crate) fn kill_controller(&mut self) {
        if let Some(stop) = self.controller.take() {
            stop.cancel();
        }
    }

    pub(crate) fn has_controller(&self) -> bool {
        self.controller.is_some()
    }

    /// Starts the router.
    pub(crate) fn start_router(&mut self) -> Result<()> {
        let process = Process::new(&self.host)?;
        self.boots += 1;
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.seed.to_be_bytes());
        seed[8..16].copy_from_slice(&(self.index as u64).to_be_bytes());
        seed[16..24].copy_from_slice(&self.boots.to_be_bytes());
        let config = Config {
            name: "router".into(),
            controller: ControllerAddress::Unix(self.socket()),
            state_dir: self.dir.join("router"),
            respawn_controller: Vec::new(),
            seed,
        };
        let runtimes =
            Runtimes { data: process.handle().clone(), control: process.handle().clone() };
        let router = process.run(|| Router::start(config, &runtimes))?;
        self.router = Some((router, process));
        Ok(())
    }

    /// Ends the router as by `kill -9`.
    pub(crate) fn kill_router(&mut self) {
        if let Some((router, process)) = self.router.take() {
            drop(process);
            drop(router);
        }
    }

    pub(crate) fn lose_disk(&self) {
        // There may be nothing yet.
        let _ = std::fs::remove_dir_all(self.dir.join("router"));
    }

    pub(crate) fn set_disk_full(&self, is_full: bool) -> Result<()> {
        // The superuser writes everywhere: what cannot be written into is a file in the directory's place.
        let (dir, aside) = (self.dir.join("router"), self.dir.join("aside"));
        if is_full && dir.is_dir() {
            std::fs::rename(&dir, &aside)?;
            std::fs::write(&dir, b"full")?;
        } else if !is_full && aside.is_dir() {
            std::fs::remove_file(&dir)?;
            std::fs::rename(&aside, &dir)?;
        }
        Ok(())
    }

    /// Gives the router away, to be ended in order.
    pub(crate) fn take_router(&mut self) -> Option<(Router, Process)> {
        self.router.take()
    }

    pub(crate) fn router(&self) -> Option<&Router> {
        self.router.as_ref().map(|(router, _)| router)
    }

    /// What its router holds open.
    pub(crate) fn sockets(&self) -> Sockets {
        self.router.as_ref().map(|(_, process)| process.sockets()).unwrap_or_default()
    }

    pub(crate) fn process(&mut self) -> Option<&mut Process> {
        self.router.as_mut().map(|(_, process)| process)
    }
}
