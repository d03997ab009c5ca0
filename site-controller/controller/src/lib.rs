//! The Skein site controller.
