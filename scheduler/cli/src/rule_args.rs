//! Labels of a new VM, and what it asks of its node, as they are typed.

use clap::Args;
use shoal_proto::cluster::Rules;

/// Labels and rules. Each can be given more than once, or several separated by commas.
#[derive(Debug, Clone, Default, Args)]
pub struct RuleArgs {
    /// A label of the VM.
    #[arg(long = "label", value_name = "KEY=VALUE", value_delimiter = ',')]
    pub labels: Vec<String>,
    /// The node's labels must be so: KEY (is there), KEY=VALUE or KEY!=VALUE.
    #[arg(long, value_name = "TERM", value_delimiter = ',')]
    selector: Vec<String>,
    /// The node may have such taints: KEY or KEY=VALUE.
    #[arg(long, value_name = "TERM", value_delimiter = ',')]
    tolerate: Vec<String>,
    /// Another VM on the node must have such labels.
    #[arg(long, value_name = "TERM", value_delimiter = ',')]
    affinity: Vec<String>,
    /// No other VM on the node may have such labels.
    #[arg(long, value_name = "TERM", value_delimiter = ',')]
    anti_affinity: Vec<String>,
    /// No other VM may be on the node, whatever its labels: it goes to an empty one, and nothing else comes there.
    #[arg(long)]
    exclusive: bool,
}

impl RuleArgs {
    /// The rules for the wire.
    #[must_use]
    pub fn rules(&self) -> Rules {
        Rules {
            selector: self.selector.clone(),
            tolerations: self.tolerate.clone(),
            affinity: self.affinity.clone(),
            anti_affinity: self.anti_affinity.clone(),
            exclusive: self.exclusive,
        }
    }
}
