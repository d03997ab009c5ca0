//! The connection to the site's controller.

use std::{io, time::Duration};

use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use skein_api::{Protocol, Resource, parse_json};
use skein_controller::Paths;
use skein_controller::store::ProxyCredentials;
use skein_wire::proto::{
    routing,
    site::{self, site_client::SiteClient},
};
use tonic::{Request, transport::Channel};

use crate::{args::Global, error::Failure, net};

/// How long the controller may take for an answer that needs nobody else.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A network of a hundred thousand addresses in one document.
const ANSWER_LEN_MAX: usize = 256 * 1024 * 1024;

/// A controller that answers.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    site: SiteClient<Channel>,
}

/// The directories of the site named by `-n`.
pub(crate) fn paths(global: &Global) -> Result<Paths, Failure> {
    Paths::discover(&global.namespace).map_err(|error| match error {
        skein_controller::PathError::Namespace(_) => Failure::usage(error),
        other => Failure::new(other),
    })
}

impl Client {
    /// Connects to the controller of the site named by `-n`.
    ///
    /// # Errors
    /// There is no site, its controller is not running, or it is somebody else's.
    pub(crate) async fn connect(global: &Global) -> Result<Self, Failure> {
        Self::connect_to(&paths(global)?).await
    }

    pub(crate) async fn connect_to(paths: &Paths) -> Result<Self, Failure> {
        let socket = paths.site_socket();
        // Tried before the channel, because a channel hides why it cannot connect.
        if let Err(error) = net::connect_unix(&socket).await {
            return Err(unreachable(paths, &error));
        }
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { net::connect_unix(&socket).await.map(TokioIo::new) }
        });
        // The address is a formality: every connection goes to the socket.
        let channel = tonic::transport::Endpoint::from_static("http://skein")
            .connect_with_connector(connector)
            .await
            .map_err(|error| {
                Failure::new("cannot talk to the controller")
                    .because(error)
                    .next("see `skctl logs`, or run `skctl restart`")
            })?;
        Ok(Self { site: SiteClient::new(channel).max_decoding_message_size(ANSWER_LEN_MAX) })
    }

    /// The generated client, for calls that answer with a stream.
    pub(crate) fn raw(&mut self) -> &mut SiteClient<Channel> {
        &mut self.site
    }

    /// One of the documents of `skein_api::status`.
    pub(crate) async fn query<T: DeserializeOwned>(&mut self, what: &str) -> Result<T, Failure> {
        let request = limited(site::QueryRequest { what: what.to_owned() });
        let document = self.site.query(request).await?.into_inner();
        parse(&document.json)
    }

    pub(crate) async fn trace<T: DeserializeOwned>(
        &mut self,
        address: String,
        port: u32,
        protocol: Protocol,
    ) -> Result<T, Failure> {
        let protocol = match protocol {
            Protocol::Tcp => routing::Protocol::Tcp.into(),
            Protocol::Udp => routing::Protocol::Udp.into(),
        };
        let request = limited(site::TraceRequest { address, port, protocol });
        parse(&self.site.trace(request).await?.into_inner().json)
    }

    /// Resources of a kind (empty: all) and name (empty: all of the kind).
    pub(crate) async fn get(&mut self, kind: &str, name: &str) -> Result<Vec<Resource>, Failure> {
        let request = limited(site::GetRequest { kind: kind.to_owned(), name: name.to_owned() });
        let resources = self.site.get(request).await?.into_inner().resources;
        resources.iter().map(resource).collect()
    }

    /// Applies all or nothing.
    pub(crate) async fn apply(
        &mut self,
        resources: &[Resource],
        dry_run: bool,
    ) -> Result<Vec<site::Change>, Failure> {
        let resources = resources.iter().map(message).collect();
        let request = site::ApplyRequest { resources, dry_run, proxy_credentials: None };
        Ok(self.site.apply(limited(request)).await?.into_inner().changes)
    }

    /// Applies the site itself, with what its proxy asks for.
    pub(crate) async fn apply_site(
        &mut self,
        site: &Resource,
        credentials: Option<&ProxyCredentials>,
    ) -> Result<Vec<site::Change>, Failure> {
        let proxy_credentials = credentials.map(|given| site::ProxyCredentials {
            url: given.url.clone(),
            credentials: given.credentials.expose().to_owned(),
        });
        let resources = vec![message(site)];
        let request = site::ApplyRequest { resources, dry_run: false, proxy_credentials };
        Ok(self.site.apply(limited(request)).await?.into_inner().changes)
    }

    /// Deletes one resource; the answer says what remains.
    pub(crate) async fn delete(
        &mut self,
        kind: &str,
        name: &str,
        now: bool,
    ) -> Result<Vec<String>, Failure> {
        let (kind, name) = (kind.to_owned(), name.to_owned());
        let request = site::DeleteRequest { kind, name, now, ..Default::default() };
        Ok(self.site.delete(limited(request)).await?.into_inner().notes)
    }

    /// Stops serving an address; with `now` also what drains of it is reset.
    pub(crate) async fn unserve(
        &mut self,
        address: &str,
        now: bool,
    ) -> Result<Vec<String>, Failure> {
        let address = address.to_owned();
        let request = site::DeleteRequest { address, now, ..Default::default() };
        Ok(self.site.delete(limited(request)).await?.into_inner().notes)
    }

    /// Deletes a link, and with `withdraw` this site's endorsement of the peer; the answer says what remains.
    pub(crate) async fn unlink(
        &mut self,
        name: &str,
        withdraw: bool,
    ) -> Result<Vec<String>, Failure> {
        let (kind, name) = ("Link".to_owned(), name.to_owned());
        let request = limited(site::DeleteRequest { kind, name, withdraw, ..Default::default() });
        Ok(self.site.delete(request).await?.into_inner().notes)
    }

    pub(crate) async fn create_token(
        &mut self,
        request: site::CreateTokenRequest,
    ) -> Result<site::CreateTokenReply, Failure> {
        Ok(self.site.create_token(limited(request)).await?.into_inner())
    }

    pub(crate) async fn export_identity(&mut self, passphrase: String) -> Result<Vec<u8>, Failure> {
        let request = limited(site::ExportIdentityRequest { passphrase });
        Ok(self.site.export_identity(request).await?.into_inner().archive)
    }

    pub(crate) async fn shutdown(&mut self, router_too: bool) -> Result<(), Failure> {
        self.site.shutdown(limited(site::ShutdownRequest { router_too })).await?;
        Ok(())
    }
}

pub(crate) fn resource(message: &site::Resource) -> Result<Resource, Failure> {
    parse_json(&message.json).map_err(|error| {
        Failure::new(format_args!(
            "cannot read {} {:?} from the controller",
            message.kind, message.name
        ))
        .because(error)
        .next("run `skctl upgrade` if skctl and controller have different versions")
    })
}

fn message(resource: &Resource) -> site::Resource {
    site::Resource {
        api_version: skein_api::API_VERSION.to_owned(),
        kind: resource.kind().to_string(),
        name: resource.name().to_owned(),
        json: resource.to_json(),
    }
}

fn limited<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER_TIMEOUT);
    request
}

pub(crate) fn parse<T: DeserializeOwned>(json: &str) -> Result<T, Failure> {
    serde_json::from_str(json).map_err(|error| {
        Failure::new("cannot read the controller's answer")
            .because(error)
            .next("run `skctl upgrade` if skctl and controller have different versions")
    })
}

fn unreachable(paths: &Paths, error: &io::Error) -> Failure {
    let namespace = paths.namespace();
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Failure::new(format_args!("the site in namespace {namespace:?} is another user's"))
            .because(format_args!("{}: {error}", paths.site_socket().display()))
            .next("run skctl as that user");
    }
    if !paths.has_site() {
        return Failure::new(format_args!("there is no site in namespace {namespace:?}"))
            .because(format_args!("nothing in {}", paths.state().display()))
            .next("create one with `skctl init`, or name another namespace with -n");
    }
    if paths.stopped_file().exists() {
        return Failure::new(format_args!("the site in namespace {namespace:?} is stopped"))
            .next("run `skctl start`");
    }
    Failure::new(format_args!("the controller of namespace {namespace:?} is not running"))
        .because(format_args!("{}: {error}", paths.site_socket().display()))
        .next("run `skctl start`; `skctl logs` tells why it ended")
}
