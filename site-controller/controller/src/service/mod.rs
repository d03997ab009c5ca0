//! What `skctl` asks for.

mod draining;
mod query;
mod resources;
mod token;
mod watch;

use std::{pin::Pin, sync::Arc, time::Duration};

use skein_wire::proto::{
    control::{Drain, TraceRequest as RouterTrace, from_router, to_router},
    site::{
        ApplyReply, ApplyRequest, CreateTokenReply, CreateTokenRequest, DeleteReply, DeleteRequest,
        DoctorRequest, Document, ExportIdentityReply, ExportIdentityRequest, GetRequest,
        LeaveRequest, Progress, QueryRequest, RedeemTokenRequest, ResourceEvent, Resources,
        RestartRouterRequest, ShutdownReply, ShutdownRequest, TraceRequest, site_server::Site,
    },
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use crate::{attach::AskError, controller::Controller, leave, store::StoreError};

/// Events on their way to one reader; a reader that stalls makes its own producer wait and nobody else.
const EVENTS_QUEUE: usize = 64;
/// How long a router may think about a trace or a probe: a probe waits for the network.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long running flows may go on when the router is restarted or stopped.
pub(crate) const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The gRPC service.
#[derive(Clone, Debug)]
pub(crate) struct SiteService(pub(crate) Arc<Controller>);

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Where a task reports how far it is.
pub(crate) type ProgressSender = mpsc::Sender<Result<Progress, Status>>;

impl SiteService {
    /// Runs `task` with somewhere to report to; it ends when the reader has gone and it next reports, or by itself.
    fn stream<T, F>(
        &self,
        task: impl FnOnce(Arc<Controller>, mpsc::Sender<Result<T, Status>>) -> F,
    ) -> Response<Events<T>>
    where
        T: Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, events) = mpsc::channel(EVENTS_QUEUE);
        let shutdown = self.0.shutdown.clone();
        let task = task(Arc::clone(&self.0), sender);
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {} // the process ends
                () = task => {} // dropped only then
            }
        });
        Response::new(Box::pin(ReceiverStream::new(events)))
    }
}

#[tonic::async_trait]
impl Site for SiteService {
    type WatchStream = Events<ResourceEvent>;
    type RedeemTokenStream = Events<Progress>;
    type DoctorStream = Events<Document>;
    type LeaveStream = Events<Progress>;
    type RestartRouterStream = Events<Progress>;

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyReply>, Status> {
        let (request, controller) = (request.into_inner(), Arc::clone(&self.0));
        // Hundreds of files are for a thread that may wait for the disk.
        let applied = tokio::task::spawn_blocking(move || controller.apply(request));
        Ok(Response::new(applied.await.map_err(|_| Status::internal("applying broke"))??))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Resources>, Status> {
        let request = request.into_inner();
        let resources = self.0.get_resources(&request.kind, &request.name)?;
        Ok(Response::new(Resources { resources }))
    }

    async fn watch(
        &self,
        request: Request<GetRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        self.0.get_resources(&request.kind, "")?; // A kind that does not exist is refused at once.
        Ok(self.stream(|controller, events| watch::run(controller, request, events)))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteReply>, Status> {
        let notes = self.0.delete(&request.into_inner())?;
        Ok(Response::new(DeleteReply { notes }))
    }

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenReply>, Status> {
        Ok(Response::new(self.0.create_token(&request.into_inner())?))
    }

    async fn redeem_token(
        &self,
        request: Request<RedeemTokenRequest>,
    ) -> Result<Response<Self::RedeemTokenStream>, Status> {
        let request = request.into_inner();
        Ok(self.stream(|controller, progress| token::redeem(controller, request, progress)))
    }

    async fn query(&self, request: Request<QueryRequest>) -> Result<Response<Document>, Status> {
        let json = self.0.document(&request.into_inner().what)?;
        Ok(Response::new(Document { json }))
    }

    async fn trace(&self, request: Request<TraceRequest>) -> Result<Response<Document>, Status> {
        let TraceRequest { address, port, protocol } = request.into_inner();
        address
            .parse::<skein_core::Address>()
            .map_err(|error| Status::invalid_argument(format!("{address:?}: {error}")))?;
        let trace = |id| {
            let address = address.clone();
            to_router::Message::Trace(RouterTrace { id, address, port, protocol })
        };
        let answer = self.0.ask(trace, ASK_TIMEOUT).await.map_err(asked)?;
        let from_router::Message::Trace(reply) = answer else {
            return Err(Status::internal("the router answered something else"));
        };
        let mut report = skein_site_core::status::trace(&address, port, &reply);
        if report.candidates.is_empty()
            && let Some(reason) = self.0.why_not_served(&address)
        {
            report.why += &format!("; it is served from here, but {reason}");
        }
        Ok(Response::new(Document { json: query::to_json(&report) }))
    }

    async fn doctor(
        &self,
        request: Request<DoctorRequest>,
    ) -> Result<Response<Self::DoctorStream>, Status> {
        let address = request.into_inner().address;
        Ok(self.stream(|controller, findings| crate::doctor::run(controller, address, findings)))
    }

    async fn export_identity(
        &self,
        request: Request<ExportIdentityRequest>,
    ) -> Result<Response<ExportIdentityReply>, Status> {
        let passphrase = zeroize::Zeroizing::new(request.into_inner().passphrase);
        let controller = Arc::clone(&self.0);
        // Deriving the key takes a second of computing on purpose.
        let sealed = tokio::task::spawn_blocking(move || controller.export_identity(&passphrase));
        let archive = sealed
            .await
            .map_err(|_| Status::internal("the encryption failed"))?
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(ExportIdentityReply { archive }))
    }

    async fn leave(
        &self,
        _request: Request<LeaveRequest>,
    ) -> Result<Response<Self::LeaveStream>, Status> {
        Ok(self.stream(leave::run))
    }

    async fn shutdown(
        &self,
        request: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownReply>, Status> {
        if request.into_inner().router_too {
            self.0.mark_stopped();
            leave::drain_routers(&self.0, false).await;
        }
        self.0.shutdown.cancel();
        Ok(Response::new(ShutdownReply {}))
    }

    async fn restart_router(
        &self,
        _request: Request<RestartRouterRequest>,
    ) -> Result<Response<Self::RestartRouterStream>, Status> {
        Ok(self.stream(leave::restart_routers))
    }
}

/// The order to end after running flows had some time.
pub(crate) fn drain(farewell: bool) -> to_router::Message {
    let deadline_ms = u64::try_from(DRAIN_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
    to_router::Message::Drain(Drain { deadline_ms, farewell })
}

fn asked(error: AskError) -> Status {
    Status::unavailable(error.to_string())
}

/// State that cannot be written is for the user to mend, with the file named.
pub(crate) fn failed(error: StoreError) -> Status {
    tracing::error!(%error, "state is not saved");
    Status::failed_precondition(error.to_string())
}
