//! Benchmarks that run Skein beside a peer in one go.
