//! A client of QEMU's machine protocol: lines of JSON over a Unix socket.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

const POLL: Duration = Duration::from_millis(2);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A connection, past its greeting.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects as soon as QEMU listens.
    ///
    /// # Errors
    /// If it does not within ten seconds, or is not QEMU.
    pub fn connect(socket: &Path) -> Result<Self> {
        let deadline = Instant::now() + CONNECT_LIMIT;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error).context("QEMU does not answer"),
                Err(_) => std::thread::sleep(POLL),
            }
        };
        stream.set_read_timeout(Some(CONNECT_LIMIT))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        let greeting = qmp.message()?;
        if greeting.get("QMP").is_none() {
            bail!("this is not QEMU: {greeting}");
        }
        qmp.run("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command. Answers what it returns.
    ///
    /// # Errors
    /// QEMU's error.
    pub fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut message = self.message()?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command}: {error}");
            } else if message.get("event").is_some() {
                self.events.push(message);
            } else if message.get("return").is_some() {
                return Ok(message["return"].take());
            }
        }
    }

    /// Waits for an event that is wanted, also one that has come already.
    ///
    /// # Errors
    /// If it does not come within `limit`.
    pub fn wait_for(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(index) = self.events.iter().position(&wanted) {
                return Ok(self.events.remove(index));
            }
            let left = deadline
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())
                .with_context(|| format!("{what}: not within {} s", limit.as_secs()))?;
            self.stream.get_ref().set_read_timeout(Some(left))?;
            let message = self.message().with_context(|| what.to_owned())?;
            self.events.push(message);
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU has closed its control socket");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU says {line}"))
    }
}

/// When an event happened, since the epoch.
///
/// # Errors
/// If it does not say.
pub fn time_of(event: &Value) -> Result<Duration> {
    let part = |name: &str| event["timestamp"][name].as_u64();
    let (Some(seconds), Some(microseconds)) = (part("seconds"), part("microseconds")) else {
        bail!("no time in {event}");
    };
    Ok(Duration::from_secs(seconds) + Duration::from_micros(microseconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn events_that_come_before_an_answer_are_kept() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("qmp");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            let mut lines = BufReader::new(stream.try_clone().expect("a clone")).lines();
            let mut stream = stream;
            writeln!(stream, r#"{{"QMP": {{}}}}"#).expect("sent");
            lines.next().expect("a line").expect("qmp_capabilities");
            writeln!(stream, r#"{{"return": {{}}}}"#).expect("sent");
            lines.next().expect("a line").expect("a command");
            let event = r#"{"event": "STOP", "timestamp": {"seconds": 3, "microseconds": 5}}"#;
            writeln!(stream, "{event}").expect("sent");
            writeln!(stream, r#"{{"return": {{"a": 1}}}}"#).expect("sent");
            lines.next().expect("a line").expect("a command");
            writeln!(stream, r#"{{"error": {{"desc": "no"}}}}"#).expect("sent");
        });
        let mut qmp = Qmp::connect(&socket).expect("connected");
        assert_eq!(qmp.run("one", &json!({})).expect("an answer")["a"], 1);
        assert!(qmp.run("two", &json!({})).is_err());
        let event = qmp
            .wait_for("STOP", Duration::from_secs(1), |event| event["event"] == "STOP")
            .expect("kept");
        assert_eq!(time_of(&event).expect("a time"), Duration::from_micros(3_000_005));
        server.join().expect("no panic");
    }
}
