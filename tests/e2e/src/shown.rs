//! How long something takes on a machine that is busy with other things.

use std::time::Duration;

use anyhow::Result;
use skein_lab::eventually;

/// When something was seen to have happened.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Since it was waited for.
    pub after: Duration,
    /// The longest that `skctl` took for an answer meanwhile.
    pub answer_max: Duration,
}

impl Shown {
    /// Asks until `check` is satisfied with the answer. What it takes to `ask` is the measure of the machine: it must not wait for what is
    /// measured, as a site's answers do while its controller starts.
    ///
    /// # Errors
    /// The last error, or that `check` never was satisfied, once `timeout` is over.
    pub fn watch<T>(
        what: &str,
        timeout: Duration,
        ask: impl Fn() -> Result<T>,
        mut check: impl FnMut(&T) -> Result<bool>,
    ) -> Result<Self> {
        let mut answer_max = Duration::ZERO;
        let after = eventually(what, timeout, || {
            let mut answer = None;
            let took = eventually("an answer", Duration::ZERO, || {
                answer = Some(ask()?);
                Ok(true)
            })?;
            answer_max = answer_max.max(took);
            answer.as_ref().map_or(Ok(false), &mut check)
        })?;
        Ok(Self { after, answer_max })
    }

    /// `limit`, and what the machine adds where it is busy with other things: the answer that is under way when something happens does not
    /// show it, the next one does, and those who act on it wait for the machine as `skctl` does.
    #[must_use]
    pub fn extended(&self, limit: Duration) -> Duration {
        limit + 4 * self.answer_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_extend_a_limit() {
        const CHECK: Duration = Duration::from_millis(200);
        let mut left = 3;
        let shown = Shown::watch(
            "so",
            Duration::from_secs(60),
            || Ok(()),
            |()| {
                std::thread::sleep(CHECK);
                left -= 1;
                Ok(left == 0)
            },
        );
        let shown = shown.expect("it becomes so");
        assert!(shown.after >= 3 * CHECK, "{shown:?}");
        // Whatever the machine adds, it is in both.
        assert!(shown.answer_max <= shown.after - 3 * CHECK, "{shown:?}");
        assert_eq!(shown.extended(Duration::ZERO), 4 * shown.answer_max);
    }
}
