//! The Skein data-plane router.
