//! One module for each group of commands: arguments, request, answer.

pub(crate) mod completion;
pub(crate) mod debug;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod expose;
pub(crate) mod identity;
pub(crate) mod init;
pub(crate) mod link;
pub(crate) mod listen;
pub(crate) mod logs;
pub(crate) mod port;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod resource;
pub(crate) mod service;
pub(crate) mod status;
pub(crate) mod token;
pub(crate) mod trace;
pub(crate) mod version;

use crate::{
    args::{Cli, Command, Format},
    error::Failure,
};

/// Does what the arguments say.
pub(crate) async fn run(cli: Cli) -> Result<(), Failure> {
    let global = &cli.global;
    if global.output == Format::Hosts && !matches!(cli.command, Command::Service(_)) {
        return Err(Failure::usage("-o hosts is for `skctl service list` only"));
    }
    match cli.command {
        // Boxed where a future is large: the enum of all of them lives on the stack.
        Command::Init(args) => Box::pin(init::run(global, args)).await,
        Command::Token(args) => token::run(global, args).await,
        Command::Link(args) => Box::pin(link::run(global, args)).await,
        Command::Unlink(args) => link::unlink(global, args).await,
        Command::Expose(args) => expose::run(global, args).await,
        Command::Unexpose(args) => expose::unexpose(global, args).await,
        Command::Listen(args) => listen::run(global, args).await,
        Command::Unlisten(args) => listen::unlisten(global, args).await,
        Command::Service(args) => service::run(global, args).await,
        Command::Status(_) => status::run(global).await,
        Command::Network(args) => status::network(global, args).await,
        Command::Trace(args) => trace::run(global, args).await,
        Command::Doctor(args) => doctor::run(global, args).await,
        Command::Apply(args) => resource::apply(global, args).await,
        Command::Get(args) => resource::get(global, args).await,
        Command::Delete(args) => Box::pin(resource::delete(global, args)).await,
        Command::Export(args) => resource::export(global, &args).await,
        Command::Start(_) => Box::pin(process::start(global)).await,
        Command::Stop(_) => Box::pin(process::stop(global)).await,
        Command::Restart(_) => Box::pin(process::restart(global)).await,
        Command::Logs(args) => logs::run(global, args).await,
        Command::Upgrade(args) => Box::pin(process::upgrade(global, args)).await,
        Command::Debug(args) => Box::pin(debug::run(global, args)).await,
        Command::Identity(args) => identity::run(global, args).await,
        Command::Demo(args) => Box::pin(demo::run(global, args)).await,
        Command::Completion(args) => completion::run(&args),
        Command::Version(args) => version::run(global, args).await,
    }
}
