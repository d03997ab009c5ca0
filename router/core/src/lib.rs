//! Pure routing logic of the Skein router: no I/O, no clock, no runtime.
