//! What differs between the things a site can run on.

pub mod linux;
