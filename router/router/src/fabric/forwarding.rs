//! Where frames go: the current view of the network joined with the links that are there.

use super::FrameLink;
use skein_core::{Fib, Handle, Label, LinkId, Pin};
use skein_wire::frame::{HEADER_LEN, Template};
use std::{collections::HashMap, sync::Arc};

/// One immutable forwarding table; replaced as a whole when the network or a link changes.
#[derive(Debug, Default)]
pub(super) struct Forwarding {
    pub(super) generation: u64,
    pub(super) fib: Arc<Fib>,
    pub(super) links: HashMap<LinkId, Arc<FrameLink>>,
    /// By label; labels are handed out from 1 upwards, so this stays short.
    by_label: Vec<Option<Arc<FrameLink>>>,
}

/// How to reach a destination now.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub(super) link: Arc<FrameLink>,
    pub(super) template: Template,
    /// Largest end-to-end packet that needs no fragmentation, in bytes.
    pub(super) mtu: usize,
}

impl Forwarding {
    pub(super) fn new(
        generation: u64,
        fib: Arc<Fib>,
        links: HashMap<LinkId, Arc<FrameLink>>,
    ) -> Self {
        let len = fib.labels.keys().map(|label| usize::from(label.0) + 1).max().unwrap_or(0);
        let mut by_label = vec![None; len];
        #[allow(clippy::iter_over_hash_type, reason = "each label has its own slot")]
        for (label, id) in &fib.labels {
            by_label[usize::from(label.0)] = links.get(id).cloned();
        }
        Self { generation, fib, links, by_label }
    }

    /// The link that `label` stands for, whether up or not.
    pub(super) fn by_label(&self, label: Label) -> Option<&Arc<FrameLink>> {
        self.by_label.get(usize::from(label.0))?.as_ref()
    }

    /// The link of that id, if frames may be sent on it.
    pub(super) fn up(&self, id: LinkId) -> Option<&Arc<FrameLink>> {
        self.links.get(&id).filter(|link| link.is_up())
    }

    /// The path of `pin`, or the next one whose first link is up.
    pub(super) fn way(&self, source: Handle, destination: Handle, pin: Pin) -> Option<Way> {
        let paths = &self.fib.routes.get(self.fib.handles.get(&destination)?)?.paths;
        let (first, rest) = paths.split_at(usize::from(pin.0) % paths.len().max(1));
        rest.iter().chain(first).find_map(|path| {
            let link = self.up(path.first_link)?;
            let template = Template::data(source, pin, &path.labels).ok()?;
            let longer = template.bytes().len() - HEADER_LEN;
            let mtu = usize::from(path.mtu.min(link.mtu())).saturating_sub(longer);
            Some(Way { link: Arc::clone(link), template, mtu })
        })
    }
}

impl Way {
    /// Whether packets take the same path.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.link, &other.link) && self.template == other.template
    }
}
