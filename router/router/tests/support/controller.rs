//! A controller's socket without a controller behind it: tests play that part, message by message.

use skein_wire::proto::control::{
    Attach, FromRouter, ToRouter,
    control_server::{Control, ControlServer},
    from_router, to_router,
};
use std::{path::Path, pin::Pin};
use tokio::{net::UnixListener, sync::mpsc, task::AbortHandle};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// A listening fake controller; dropped, its socket is dead.
pub(crate) struct FakeController {
    attachments: mpsc::Receiver<Attachment>,
    server: AbortHandle,
}

/// One router's stream.
pub(crate) struct Attachment {
    pub(crate) attach: Attach,
    from: Streaming<FromRouter>,
    to: mpsc::Sender<Result<ToRouter, Status>>,
}

impl FakeController {
    pub(crate) fn listen(path: &Path) -> Self {
        // A predecessor's socket file may be there, as after a crash.
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let (arrived, attachments) = mpsc::channel(8);
        let server = Server::builder()
            .add_service(ControlServer::new(Service { arrived }))
            .serve_with_incoming(UnixListenerStream::new(listener));
        #[allow(clippy::disallowed_methods, reason = "the fake owns the task by its abort handle")]
        let server = tokio::spawn(async { server.await.unwrap() }).abort_handle();
        Self { attachments, server }
    }

    pub(crate) async fn attached(&mut self) -> Attachment {
        self.attachments.recv().await.unwrap()
    }
}

impl Drop for FakeController {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Attachment {
    #[allow(dead_code, reason = "not every test expects the router to live")]
    pub(crate) async fn send(&self, message: to_router::Message) {
        self.to.send(Ok(ToRouter { message: Some(message) })).await.unwrap();
    }

    /// Sends to a router that may have been killed.
    #[allow(dead_code, reason = "not every test kills routers")]
    pub(crate) async fn try_send(&self, message: to_router::Message) {
        drop(self.to.send(Ok(ToRouter { message: Some(message) })).await);
    }

    /// The next message of the router; `None` once it is gone.
    pub(crate) async fn next(&mut self) -> Option<from_router::Message> {
        self.from.message().await.ok()??.message
    }
}

struct Service {
    arrived: mpsc::Sender<Attachment>,
}

#[tonic::async_trait]
impl Control for Service {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<ToRouter, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<FromRouter>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut from = request.into_inner();
        let Some(from_router::Message::Attach(attach)) =
            from.message().await?.and_then(|m| m.message)
        else {
            return Err(Status::invalid_argument("attach comes first"));
        };
        let (to, messages) = mpsc::channel(64);
        let attachment = Attachment { attach, from, to };
        self.arrived.send(attachment).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}
