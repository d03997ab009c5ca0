//! The Skein command line.
