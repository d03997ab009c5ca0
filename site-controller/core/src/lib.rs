//! Pure planning of a site: desired and observed state in, actions out.
