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
    /// Links that are there, ascending by label.
    by_label: Vec<(Label, Arc<FrameLink>)>,
    /// Packets one call may hand to any link's carrier; `None` without links.
    pub(super) segments_max: Option<usize>,
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
        let labelled = fib.labels.iter();
        let mut by_label: Vec<_> =
            labelled.filter_map(|(&label, id)| Some((label, Arc::clone(links.get(id)?)))).collect();
        by_label.sort_unstable_by_key(|(label, _)| *label);
        let segments_max = links.values().map(|link| link.carrier().segments_max()).min();
        Self { generation, fib, links, by_label, segments_max }
    }

    /// The link that `label` stands for, whether up or not.
    pub(super) fn by_label(&self, label: Label) -> Option<&Arc<FrameLink>> {
        let at = self.by_label.binary_search_by_key(&label, |(label, _)| *label).ok()?;
        Some(&self.by_label[at].1)
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
