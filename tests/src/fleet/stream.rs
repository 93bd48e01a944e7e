//! One agent's stream of reports, for as long as it is polled.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prost::Message as _;
use shoal_proto::node::agent_report::Report;
use shoal_proto::node::registry_client::RegistryClient;
use shoal_proto::node::scheduler_message::Message;
use shoal_proto::node::{AgentReport, Register, SchedulerMessage};
use shoal_report::{Encoder, Thresholds};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::{Shared, load};

const SECOND: Duration = Duration::from_secs(1);

pub(super) async fn report(shared: Arc<Shared>, number: usize, channel: Channel, address: SocketAddr) {
    loop {
        let end = session(&shared, number, channel.clone(), address).await;
        if let Err(status) = end {
            eprintln!("agent {number}: {status}");
        }
        tokio::time::sleep(SECOND).await;
    }
}

async fn session(
    shared: &Shared,
    number: usize,
    channel: Channel,
    address: SocketAddr,
) -> Result<(), Status> {
    let (reports, queue) = mpsc::channel(8);
    let register = Register {
        node: shared.node(number).name.clone(),
        address: address.to_string(),
        cpus: load::CPUS,
        memory_bytes: load::MEMORY,
        version: "simulated".to_owned(),
        cpu_speed: 1.0,
        ..Register::default()
    };
    let send = |report| AgentReport { report: Some(report) };
    let closed = |_| Status::unavailable("the stream has ended");
    reports
        .send(send(Report::Register(register)))
        .await
        .map_err(closed)?;
    let mut client = RegistryClient::new(channel);
    let mut messages = client.report(ReceiverStream::new(queue)).await?.into_inner();
    let whole_wanted = AtomicBool::new(false);
    registered(&mut messages).await?;
    shared.counters.sessions.fetch_add(1, Ordering::Relaxed);
    let write = async {
        let phase = u32::try_from(number % 60).unwrap_or(0);
        let mut encoder = Encoder::new(Thresholds::DEFAULT, phase);
        // Agents do not report at the same moment.
        let offset = SECOND.mul_f64(f64::from(u32::try_from(number % 997).unwrap_or(0)) / 997.0);
        let mut ticks = interval_at(Instant::now() + offset, SECOND);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if whole_wanted.swap(false, Ordering::Relaxed) || shared.whole_only.load(Ordering::Relaxed) {
                encoder.want_whole();
            }
            if let Some(report) = next(shared, number, &mut encoder) {
                reports.send(send(report)).await.map_err(closed)?;
                shared.told(number);
            }
        }
    };
    let read = async {
        while let Some(message) = messages.message().await? {
            if let Some(Message::WholeReportWanted(_)) = message.message {
                whole_wanted.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    let end = tokio::select! {
        end = write => end,
        end = read => end,
    };
    shared.counters.sessions.fetch_sub(1, Ordering::Relaxed);
    end
}

async fn registered(messages: &mut Streaming<SchedulerMessage>) -> Result<(), Status> {
    match messages.message().await?.and_then(|message| message.message) {
        Some(Message::Registered(_)) => Ok(()),
        other => Err(Status::internal(format!("not registered: {other:?}"))),
    }
}

/// The report of this second; none if it is to be lost.
fn next(shared: &Shared, number: usize, encoder: &mut Encoder) -> Option<Report> {
    let mut node = shared.node(number);
    let now = node.step();
    let if_whole = now.encoded_len();
    let report = encoder.encode(now);
    if std::mem::take(&mut node.lose_next) {
        return None;
    }
    let counters = &shared.counters;
    let (counter, bytes) = match &report {
        Report::Delta(delta) => (&counters.deltas, delta.encoded_len()),
        Report::Heartbeat(whole) => (&counters.wholes, whole.encoded_len()),
        _ => return Some(report),
    };
    counter.fetch_add(1, Ordering::Relaxed);
    counters.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    counters
        .bytes_if_whole
        .fetch_add(if_whole as u64, Ordering::Relaxed);
    Some(report)
}
