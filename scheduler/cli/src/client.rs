//! The connection to the cluster API: to the scheduler that leads, where there are several.

use std::future::Future;
use std::time::Duration;

use shoal_proto::cluster::ListSchedulersRequest;
use shoal_proto::cluster::cluster_client::ClusterClient;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::args::GlobalArgs;
use crate::error::{CliError, chain};
use crate::output::Output;

/// A client of the cluster API.
pub type Client = ClusterClient<Channel>;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Of a scheduler that leads, so that its death is noticed while a stream of it is followed.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the schedulers may take to elect one that leads.
const ELECTION: Duration = Duration::from_secs(20);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(300);
/// How long a scheduler may take to say who leads.
const ASK: Duration = Duration::from_secs(3);
/// A list of 100,000 VMs is about 20 MiB.
const MAX_MESSAGE: usize = 64 << 20;

/// What every command that talks to the cluster needs.
#[derive(Debug, Clone)]
pub struct Context {
    /// Where schedulers answer, as `http://HOST:PORT`.
    pub endpoints: Vec<String>,
    /// Somebody said so; otherwise it is where `up` has them by default.
    pub endpoints_are_said: bool,
    /// Where results go.
    pub output: Output,
}

impl Context {
    /// From the options of the command line.
    #[must_use]
    pub fn new(global: &GlobalArgs) -> Self {
        Self {
            endpoints: global.endpoints(),
            endpoints_are_said: global.says_where(),
            output: global.output(),
        }
    }

    /// Connects to the scheduler that leads, or says that nothing answers.
    pub async fn client(&self) -> Result<Client, CliError> {
        connect(&self.endpoints).await
    }

    /// The same after a connection broke in the middle of something that can be asked for again: `None` if that makes no
    /// sense, as there is only one scheduler.
    pub async fn again(&self, error: &CliError) -> Option<Client> {
        if self.endpoints.len() < 2 || !error.is_interruption() {
            return None;
        }
        self.output.note(&format!("{error}\nasking the schedulers again"));
        self.client().await.ok()
    }
}

/// What one scheduler says of who leads.
enum Answer {
    /// It does.
    Itself(Client),
    /// One at this address does.
    Other(String),
    /// None, at the moment.
    Nobody(Client),
}

/// Connects to the scheduler that leads, among those at these endpoints. While none leads waits for an election; should
/// there be none, one that only answers what is stored has to do.
pub async fn connect(endpoints: &[String]) -> Result<Client, CliError> {
    check_endpoints(endpoints)?;
    let deadline = Instant::now() + ELECTION;
    loop {
        let mut unreachable = None;
        let mut follower = None;
        for endpoint in endpoints {
            match ask(endpoint).await {
                Ok(Answer::Itself(client)) => return Ok(client),
                Ok(Answer::Nobody(client)) => follower = Some(client),
                Ok(Answer::Other(leader)) => match ask(&format!("http://{leader}")).await {
                    Ok(Answer::Itself(client)) => return Ok(client),
                    // It is dead and its lease has not ended, or it cannot be reached from here.
                    _ => follower = Some(open(endpoint).await?),
                },
                Err(error) => unreachable = Some(error),
            }
        }
        let Some(follower) = follower else {
            return Err(unreachable.unwrap_or_else(|| CliError::Usage("--scheduler: names none".into())));
        };
        if Instant::now() >= deadline {
            return Ok(follower);
        }
        sleep(PAUSE).await;
    }
}

async fn ask(endpoint: &str) -> Result<Answer, CliError> {
    let client = open(endpoint).await?;
    Ok(match who_leads(&client, endpoint).await? {
        None => Answer::Itself(client),
        Some(Some(leader)) => Answer::Other(leader),
        Some(None) => Answer::Nobody(client),
    })
}

/// `None`: this one leads. `Some(None)`: nobody does.
async fn who_leads(client: &Client, endpoint: &str) -> Result<Option<Option<String>>, CliError> {
    let unreachable = |reason: String| CliError::Unreachable {
        endpoint: endpoint.to_owned(),
        reason,
    };
    let mut client = client.clone();
    let asked = tokio::time::timeout(ASK, client.list_schedulers(ListSchedulersRequest {})).await;
    let listed = match asked {
        Ok(Ok(listed)) => listed.into_inner().schedulers,
        // One of before there were several.
        Ok(Err(status)) if status.code() == Code::Unimplemented => return Ok(None),
        // It lives, and its store does not answer.
        Ok(Err(status)) if status.code() == Code::Internal => return Ok(Some(None)),
        Ok(Err(status)) => return Err(unreachable(status.message().to_owned())),
        Err(_) => return Err(unreachable(format!("no answer within {ASK:?}"))),
    };
    if listed
        .iter()
        .any(|scheduler| scheduler.leads && scheduler.answers)
    {
        return Ok(None);
    }
    let leader = listed.into_iter().find(|scheduler| scheduler.leads);
    Ok(Some(leader.map(|leader| leader.address)))
}

/// Refuses what is no endpoint of a scheduler. They speak no TLS yet: `https` would get plain text.
pub fn check_endpoints(endpoints: &[String]) -> Result<(), CliError> {
    endpoints
        .iter()
        .try_for_each(|endpoint| channel(endpoint).map(drop))
}

fn channel(endpoint: &str) -> Result<Endpoint, CliError> {
    if endpoint.starts_with("https:") {
        return Err(CliError::Usage(format!(
            "--scheduler: '{endpoint}': schedulers do not speak TLS yet; use http://HOST:PORT on a network you trust"
        )));
    }
    Endpoint::from_shared(endpoint.to_owned())
        .ok()
        .filter(|e| e.uri().scheme_str() == Some("http") && e.uri().host().is_some())
        .ok_or_else(|| {
            CliError::Usage(format!(
                "--scheduler: '{endpoint}' is not of the form HOST:PORT or http://HOST:PORT"
            ))
        })
}

async fn open(endpoint: &str) -> Result<Client, CliError> {
    let channel = channel(endpoint)?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(|error| CliError::Unreachable {
            endpoint: endpoint.to_owned(),
            reason: chain(&error),
        })?;
    Ok(ClusterClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

/// Watches something that goes on without this command. Ctrl-C and SIGTERM end the watching, with an error that says what goes
/// on and the status that a shell gives for the signal. Commands without such a word leave both signals their default: they are
/// ended by them.
pub async fn until_interrupted<T>(
    work: impl Future<Output = Result<T, CliError>>,
    goes_on: impl FnOnce() -> String,
) -> Result<T, CliError> {
    let wait =
        |kind| signal(kind).map_err(|error| CliError::Failed(format!("cannot wait for signals: {error}")));
    let mut interrupt = wait(SignalKind::interrupt())?;
    let mut terminate = wait(SignalKind::terminate())?;
    let kind = tokio::select! {
        done = work => return done,
        _ = interrupt.recv() => SignalKind::interrupt(),
        _ = terminate.recv() => SignalKind::terminate(),
    };
    Err(CliError::Interrupted {
        signal: u8::try_from(kind.as_raw_value()).unwrap_or(u8::MAX),
        goes_on: goes_on(),
    })
}
