//! Benchmarks that run Skein beside a peer in one go: one network, one round after another, and in each
//! round every column, so that what the machine does meanwhile hits all of them alike.

pub mod column;
pub mod measure;
pub mod table;
