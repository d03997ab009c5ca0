//! What the tests of whole routers share.

pub(crate) mod controller;
pub(crate) mod site;
