//! Resource types and the token format: what users write and read.
