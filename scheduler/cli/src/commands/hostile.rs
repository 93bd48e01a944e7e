//! What others wrote, in every view that people read.

use shoal_proto::cluster::{
    AlternativeNode, CpuBaseline, Event, Explanation, Image, Migration, Node, NodeCpu, PlannedHold,
    PlannedMove, RebalanceResponse, Rules, Suspension, Vm,
};
use shoal_proto::vm::MigrationReport;

use super::{cpu, events, explain, image, inspect, migrate, migrations, nodes, ps, rebalance, suspend};
use crate::page::Page;
use crate::page::tests::{HOSTILE, assert_tame};
use crate::view::{ImageView, MigrationDetails, MigrationView, NodeView, VmView};

fn hostile() -> String {
    HOSTILE.to_owned()
}

fn vm() -> Vm {
    let several = vec![hostile(), hostile()];
    Vm {
        id: hostile(),
        name: hostile(),
        node: hostile(),
        image: hostile(),
        image_digest: hostile(),
        message: hostile(),
        home: hostile(),
        pinned: hostile(),
        args: several.clone(),
        labels: several.clone(),
        rules: Some(Rules {
            selector: several.clone(),
            tolerations: several.clone(),
            affinity: several.clone(),
            anti_affinity: several,
            exclusive: true,
        }),
        suspension: Some(Suspension {
            reason: hostile(),
            ..Suspension::default()
        }),
        migrations: vec![migration()],
        ..Vm::default()
    }
}

fn migration() -> Migration {
    Migration {
        id: hostile(),
        vm: hostile(),
        vm_name: hostile(),
        from_node: hostile(),
        to_node: hostile(),
        reason: hostile(),
        report: Some(MigrationReport {
            reason: hostile(),
            ..MigrationReport::default()
        }),
        ..Migration::default()
    }
}

fn assert_all_tame(pages: impl IntoIterator<Item = Page>) {
    for page in pages {
        assert_tame(&page.to_string());
    }
}

#[test]
fn vms_and_migrations_cannot_change_the_terminal() {
    let (vm, moved) = (vm(), migration());
    assert_all_tame([
        ps::vm_table(&[VmView::from(&vm)]),
        ps::wide_table(&[VmView::from(&vm)]),
        inspect::text(&inspect::inspection(&vm)),
        suspend::text(&[VmView::from(&vm)]),
        migrate::report(&MigrationView::from(&moved)),
        migrations::list::text(&[MigrationView::from(&moved)]),
        migrations::show::text(&MigrationDetails::from(&moved)),
    ]);
}

#[test]
fn nodes_and_images_cannot_change_the_terminal() {
    let node = Node {
        name: hostile(),
        address: hostile(),
        cpu_model: hostile(),
        labels: vec![hostile()],
        taints: vec![hostile()],
        kvm_trouble: hostile(),
        ..Node::default()
    };
    let image = Image {
        name: hostile(),
        digest: hostile(),
        cmdline: hostile(),
        ..Image::default()
    };
    let baseline = CpuBaseline {
        features: vec![hostile()],
        nodes: vec![NodeCpu {
            node: hostile(),
            model: hostile(),
            extra_features: vec![hostile()],
            missing_features: vec![hostile()],
        }],
        ..CpuBaseline::default()
    };
    assert_all_tame([
        nodes::node_table(&[NodeView::from(&node)]),
        nodes::wide_table(&[NodeView::from(&node)]),
        image::image_table(&[ImageView::from(&image)]),
        cpu::text(&baseline.into()),
    ]);
}

#[test]
fn plans_and_events_cannot_change_the_terminal() {
    let explanation = Explanation {
        vm: hostile(),
        node: hostile(),
        placement: hostile(),
        verdict: hostile(),
        nodes: vec![AlternativeNode {
            node: hostile(),
            rejected: hostile(),
            ..AlternativeNode::default()
        }],
        ..Explanation::default()
    };
    let plan = RebalanceResponse {
        moves: vec![PlannedMove {
            vm: hostile(),
            from_node: hostile(),
            to_node: hostile(),
            kind: hostile(),
            reason: hostile(),
            details: hostile(),
        }],
        holds: vec![PlannedHold {
            vm: hostile(),
            node: hostile(),
            action: hostile(),
            reason: hostile(),
        }],
        summary: hostile(),
        results: vec![migration()],
        ..RebalanceResponse::default()
    };
    let event = Event {
        kind: hostile(),
        vm: hostile(),
        node: hostile(),
        message: hostile(),
        ..Event::default()
    };
    assert_all_tame([
        explain::text(&explanation.into()),
        rebalance::text(&rebalance::view(plan, true)),
        Page::from(events::text(&event)),
    ]);
}
