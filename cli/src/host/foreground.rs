//! A site that lives as long as the command that runs it.

use std::{io, os::unix::process::CommandExt as _, process::Stdio};

use skein_api::Service;
use skein_controller::Paths;

use super::{Prepare, START_TIMEOUT, controller, end, prepare};
use crate::{Interrupt, client::Client, error::Failure, input, progress::Progress};

/// Runs the controller under this process, its log on standard error, until it ends or this process is told to end;
/// then controller and router end in order.
///
/// # Errors
/// The controller cannot be started, fails, or does not end.
pub(crate) async fn run_here(paths: &Paths, progress: &mut Progress) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::new("cannot run the controller").because(error);
    // From here on nothing ends this process but the end of what it is about to start.
    let mut interrupt = Interrupt::new()?;
    let of_site = paths.clone();
    let prepared = input::blocking(move || Ok(prepare(&of_site, |_, _| Service::None))).await?;
    match prepared {
        Err(Prepare::Running(failure)) => {
            return Err(failure.next("stop it first with `skctl stop`"));
        }
        Err(Prepare::Failed(failure)) => return Err(failure),
        Ok(_) => {}
    }
    let mut command = controller(paths);
    // Ctrl-C is meant for this process, which ends the router too.
    command.stdin(Stdio::null()).process_group(0);
    let mut child = tokio::process::Command::from(command).spawn().map_err(failed)?;
    let ended = tokio::select! {
        status = child.wait() => Some(status.map_err(failed)?), // cancel-safe
        () = interrupt.recv() => None, // cancel-safe
    };
    if ended.is_none()
        && let Ok(mut client) = Client::connect_to(paths).await
        && let Err(failure) = client.shutdown(true).await
    {
        progress.step(format!("ending the processes by signals ({failure})"));
    }
    // A controller that ended by itself leaves its router behind; one that does not answer yet is told by a signal.
    let (gone, reaped) =
        tokio::join!(end::end(paths, progress), tokio::time::timeout(START_TIMEOUT, child.wait()));
    gone?;
    match ended {
        // That is how it is meant to end.
        None => match reaped {
            Ok(_) => Ok(()),
            Err(_) => Err(Failure::timeout("the controller does not end")),
        },
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(Failure::new(format_args!("the controller ended with {status}"))),
    }
}
