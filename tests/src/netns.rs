//! Hosts of their own: network namespaces joined through a switch by links of a given speed.

use std::process::Command;

/// Namespaces around a switch; all is removed in the end.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    hosts: Vec<String>,
}

impl Network {
    /// One namespace for each host, each with one veth link to a bridge in a namespace of its own. `rate` as tc says it.
    #[must_use]
    pub fn new(hosts: &[&str], rate: &str) -> Self {
        let mut network = Self {
            prefix: format!("shoal{}", std::process::id()),
            hosts: Vec::new(),
        };
        let switch = network.namespace("switch");
        ip(&["netns", "add", &switch]);
        ip(&["-n", &switch, "link", "add", "br0", "type", "bridge"]);
        ip(&["-n", &switch, "link", "set", "br0", "up"]);
        for host in hosts {
            network.join(host, rate);
        }
        network
    }

    fn join(&mut self, host: &str, rate: &str) {
        let (switch, namespace) = (self.namespace("switch"), self.namespace(host));
        ip(&["netns", "add", &namespace]);
        self.hosts.push(host.to_owned());
        ip(&[
            "-n", &switch, "link", "add", "name", host, "type", "veth", "peer", "name", "eth0", "netns",
            &namespace,
        ]);
        ip(&["-n", &switch, "link", "set", "dev", host, "master", "br0", "up"]);
        let address = format!("{}/24", self.address(host));
        ip(&["-n", &namespace, "addr", "add", &address, "dev", "eth0"]);
        ip(&["-n", &namespace, "link", "set", "eth0", "up"]);
        ip(&["-n", &namespace, "link", "set", "lo", "up"]);
        for (namespace, device) in [(&switch, host), (&namespace, "eth0")] {
            limit(namespace, device, "add", rate);
        }
    }

    /// A host's IP address.
    #[must_use]
    pub fn address(&self, host: &str) -> String {
        let number = self
            .hosts
            .iter()
            .position(|h| h == host)
            .expect("a host of this network")
            + 1;
        format!("10.77.0.{number}")
    }

    /// The words to put before a command so that it runs on a host.
    #[must_use]
    pub fn on(&self, host: &str) -> Vec<String> {
        ["ip".into(), "netns".into(), "exec".into(), self.namespace(host)].to_vec()
    }

    /// Makes a host's link slower or faster, both ways; `rate` as tc says it.
    pub fn set_rate(&self, host: &str, rate: &str) {
        for (namespace, device) in [(self.namespace("switch"), host), (self.namespace(host), "eth0")] {
            limit(&namespace, device, "replace", rate);
        }
    }

    /// Cuts a host's link.
    pub fn cut(&self, host: &str) {
        ip(&[
            "-n",
            &self.namespace("switch"),
            "link",
            "set",
            "dev",
            host,
            "down",
        ]);
    }

    /// Brings it back.
    pub fn restore(&self, host: &str) {
        ip(&["-n", &self.namespace("switch"), "link", "set", "dev", host, "up"]);
    }

    fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in self.hosts.iter().map(String::as_str).chain(["switch"]) {
            // Nothing can be done about a namespace that does not go.
            drop(
                Command::new("ip")
                    .args(["netns", "delete", &self.namespace(host)])
                    .output(),
            );
        }
    }
}

fn limit(namespace: &str, device: &str, verb: &str, rate: &str) {
    let limit = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"];
    run(Command::new("tc")
        .args(["-n", namespace, "qdisc", verb, "dev", device])
        .args(limit));
}

fn ip(args: &[&str]) {
    run(Command::new("ip").args(args));
}

fn run(command: &mut Command) {
    let output = command.output().expect("iproute2 is installed");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
