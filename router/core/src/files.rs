//! How the files that a router may open are shared out: its controller decides about a part of them, and the router about the rest.

/// This fraction is for everything but flows and automatic endpoints: links and those to come, listeners the user asked for, health checks,
/// control, claims.
const OTHER_DIVISOR: u64 = 8;
const OTHER_MIN: u64 = 64;
const OTHER_MAX: u64 = 8_192;
/// This fraction is for endpoints that open by themselves.
const AUTOMATIC_DIVISOR: u64 = 4;

/// Automatic endpoints open at a time: a socket, a task and about half a KiB of configuration each.
pub const AUTOMATIC_MAX: usize = 16_384;

/// Parts of the files that a router may open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileShares {
    /// For flows at both edges: one each.
    pub flows: usize,
    /// For endpoints that open by themselves, at most [`AUTOMATIC_MAX`].
    pub automatic: usize,
}

/// Shares out `files_max` files. What neither part has is for everything else.
#[must_use]
pub fn share_out_files(files_max: u64) -> FileShares {
    let other = (files_max / OTHER_DIVISOR).clamp(OTHER_MIN, OTHER_MAX);
    let automatic = (files_max / AUTOMATIC_DIVISOR).min(AUTOMATIC_MAX as u64);
    let flows = files_max.saturating_sub(other).saturating_sub(automatic);
    let count = |files| usize::try_from(files).unwrap_or(usize::MAX);
    FileShares { flows: count(flows), automatic: count(automatic) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_no_more_than_the_whole() {
        for files_max in [0, 10, 100, 1_024, 4_096, 65_536, 1 << 20, u64::MAX] {
            let shares = share_out_files(files_max);
            let other = (files_max / 8).clamp(64, 8_192);
            let given = shares.flows as u64 + shares.automatic as u64;
            assert!(given <= files_max.saturating_sub(other).max(files_max / 4), "{files_max}");
        }
        assert_eq!(share_out_files(1_024), FileShares { flows: 640, automatic: 256 });
        assert_eq!(share_out_files(1 << 20).automatic, AUTOMATIC_MAX);
    }
}
