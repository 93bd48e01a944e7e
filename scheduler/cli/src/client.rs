//! The connection to the cluster API.

use std::future::Future;
use std::time::Duration;

use shoal_proto::cluster::cluster_client::ClusterClient;
use tonic::transport::{Channel, Endpoint};

use crate::args::GlobalArgs;
use crate::error::{CliError, chain};
use crate::output::Output;

/// A client of the cluster API.
pub type Client = ClusterClient<Channel>;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(10);
/// A list of 100,000 VMs is about 20 MiB.
const MAX_MESSAGE: usize = 64 << 20;

/// What every command that talks to the cluster needs.
#[derive(Debug, Clone)]
pub struct Context {
    /// Where the cluster answers.
    pub endpoint: String,
    /// Where results go.
    pub output: Output,
}

impl Context {
    /// From the options of the command line.
    #[must_use]
    pub fn new(global: &GlobalArgs) -> Self {
        Self {
            endpoint: global.endpoint.clone(),
            output: global.output(),
        }
    }

    /// Connects, or says that nothing answers.
    pub async fn client(&self) -> Result<Client, CliError> {
        connect(&self.endpoint).await
    }
}

/// Connects to the cluster API at `endpoint`.
pub async fn connect(endpoint: &str) -> Result<Client, CliError> {
    let channel = Endpoint::from_shared(endpoint.to_owned())
        .ok()
        .filter(|e| e.uri().scheme_str() == Some("http") && e.uri().host().is_some())
        .ok_or_else(|| {
            CliError::Usage(format!(
                "--endpoint: '{endpoint}' is not of the form http://HOST:PORT"
            ))
        })?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(|error| CliError::Unreachable {
            endpoint: endpoint.to_owned(),
            reason: chain(&error),
        })?;
    Ok(ClusterClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

/// Runs to its end, or to Ctrl-C (`None`).
pub async fn until_interrupted<T>(
    work: impl Future<Output = Result<T, CliError>>,
) -> Result<Option<T>, CliError> {
    tokio::select! {
        done = work => done.map(Some),
        _ = tokio::signal::ctrl_c() => Ok(None),
    }
}
